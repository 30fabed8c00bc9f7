"""Every back-end against attention over all pairs by a dense mask, in float64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import attention_errors as oracles
from helpers import flash_stand_in
from helpers.attention_errors import brute_force, by_dense_mask, random_qkv, visible_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention import backends, flash, flex
from attention.backends import BACKENDS, Mask, attend, check, choose, use
from attention.dense import reference_is_fastest
from model import Transformer
from model_args import ModelArgs

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # the name of a device, which need not be there
TIGHT = 1e-12  # float64, sums of a dozen products of size 1
DIFFERENTIABLE = [name for name in BACKENDS if name != "flex"]  # flex_attention has no backward pass on a CPU

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
ANY = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _flash_stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in.package())


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


SHAPES = {
    "B": st.integers(1, 3),
    "K": st.integers(1, 3),
    "per_kv": st.integers(1, 3),
    "T": st.integers(1, 9),
    "D": st.sampled_from([2, 4, 6]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=10, deadline=None)
@given(**SHAPES)
def test_dense_mask_oracle_is_the_formula_by_loops(B, K, per_kv, T, D, seed):
    q, k, v = random_qkv(B, K * per_kv, K, T, T + 2, D, seed=seed)
    visible = visible_pairs(B, K * per_kv, T, T + 2)
    torch.testing.assert_close(by_dense_mask(q, k, v, visible), brute_force(q, k, v, visible), atol=TIGHT, rtol=0)


# ---- each back-end, each mask


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@ANY
@given(**SHAPES)
def test_causal(backend, B, K, per_kv, T, D, seed):
    assert oracles.causal_error(backend, B, K * per_kv, K, T, D, seed) < TIGHT


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@ANY
@given(**SHAPES, window=st.integers(1, 10) | st.none())
def test_packed_documents_and_window(backend, B, K, per_kv, T, D, seed, window):
    assert oracles.packed_error(backend, B, K * per_kv, K, T, D, window, seed) < TIGHT


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@ANY
@given(**SHAPES, past=st.integers(0, 6), window=st.integers(1, 9) | st.none())
def test_lower_right(backend, B, K, per_kv, T, D, seed, past, window):
    """A single query sees every key, in the window; a chunk of them as the last rows of the whole would."""
    assert oracles.lower_right_error(backend, B, K * per_kv, K, T, T + past, D, window, seed) < TIGHT


def test_flex():
    """Its values; fewer of them, for it is slow on a CPU."""
    assert oracles.causal_error("flex", gradients=False) < TIGHT
    assert oracles.packed_error("flex", T=130, B=1, H=2, K=1, gradients=False) < TIGHT  # more than a block
    assert oracles.packed_error("flex", H=3, window=3, gradients=False, K=3) < TIGHT
    assert oracles.lower_right_error("flex", gradients=False) < TIGHT
    assert oracles.lower_right_error("flex", T=1, window=4, gradients=False) < TIGHT


@ANY
@given(B=st.integers(1, 3), per_kv=st.integers(1, 3), T=st.integers(1, 5), S=st.integers(1, 7), per_row=st.booleans())
def test_a_written_mask(B, per_kv, T, S, per_row):
    """Any pairs at all; queries that see nothing get 0, and so does what they would have learnt from."""
    leaves = [x.requires_grad_() for x in random_qkv(B, 2 * per_kv, 2, T, S, 4)]
    visible = torch.rand(B if per_row else 1, 1, T, S, generator=torch.Generator().manual_seed(T * S)) < 0.4
    visible[:, :, -1] = False
    some = visible.any(-1, keepdim=True)
    expected = by_dense_mask(*leaves, (visible | ~some).expand(B, 2 * per_kv, T, S)).masked_fill(~some, 0)
    outs = [attend(*leaves, Mask(dense=visible), name) for name in ("reference", "sdpa")]
    for out in outs:
        torch.testing.assert_close(out, expected, atol=TIGHT, rtol=0)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (expected, *outs)]
    for theirs, *ours in zip(*grads):
        for grad in ours:
            torch.testing.assert_close(grad, theirs, atol=TIGHT, rtol=0)


def test_a_written_mask_by_flex():
    qkv = random_qkv(2, 2, 1, 3, 5, 4)
    visible = torch.rand(2, 1, 3, 5) < 0.5
    visible[1, :, 1] = False
    for dense in (visible, visible[1:]):
        expected = attend(*qkv, Mask(dense=dense), "reference")
        torch.testing.assert_close(attend(*qkv, Mask(dense=dense), "flex"), expected, atol=TIGHT, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gets_0_in_every_format(backend, dtype):
    leaves = [x.requires_grad_() for x in random_qkv(1, 2, 1, 40, 40, 16, dtype)]
    visible = torch.ones(40, 40, dtype=torch.bool).tril()
    visible[:7] = False
    out = attend(*leaves, Mask(dense=visible[None, None]), backend)
    assert (out[:, :, :7] == 0).all() and (out[:, :, 7:] != 0).any()
    for grad in torch.autograd.grad(out.float().sum(), leaves):
        assert grad.isfinite().all()


def test_is_causal_with_fewer_queries_than_keys_is_not_lower_right():
    """PyTorch's flag lines the triangle up with the first key; the oracle tells it from ours."""

    def top_left(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    assert oracles.lower_right_error(top_left) > 0.1
    assert oracles.lower_right_error(top_left, T=8) < TIGHT
    for fused in (lambda q, k, v, mask: BACKENDS["sdpa"].attend(q, k, v, mask, None), "sdpa"):  # as on a GPU, and here
        assert oracles.lower_right_error(fused) < TIGHT


def test_window_of_mistral_by_hand():
    """Key j is visible to query i when 0 <= i - j < W."""
    mask = Mask(window=3).boolean(5, 5, CPU)[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert Mask(window=5).plain(5) and not Mask(window=4).plain(5)


@pytest.mark.parametrize(
    "T, S, mask", [(5, 2, None), (5, 2, Mask()), (2, 5, Mask(torch.zeros(1, 2))), (2, 6, Mask(group=4))]
)
def test_what_a_mask_does_not_say_is_refused(T, S, mask):
    with pytest.raises(ValueError, match=f"{T} queries over {S} keys needs a dense mask"):
        attend(*random_qkv(1, 2, 1, T, S, 2), mask)


def test_bfloat16_stays_near_float64(backend):
    q, k, v = random_qkv(2, 4, 2, 33, 33, 16, torch.bfloat16)
    out = attend(q, k, v, backend=backend)
    assert out.dtype == torch.bfloat16
    exact = attend(q.double(), k.double(), v.double())
    # weights and output are rounded to 8 bits each; values are of size 1
    torch.testing.assert_close(out.double(), exact, atol=0.03, rtol=0)


# ---- layouts


def test_layout_is_made_once_for_all_layers(backend, monkeypatch):
    mask, made = Mask(oracles.random_documents(2, 6)), []
    one = BACKENDS[backend]
    counted = one._replace(layout=lambda *args: made.append(args) or one.layout(*args))
    monkeypatch.setitem(BACKENDS, backend, counted)
    for seed in range(3):
        attend(*random_qkv(2, 2, 1, 6, 6, 4, seed=seed), mask, backend)
    assert len(made) == 1


def test_flash_is_told_where_documents_begin():
    doc_ids = torch.tensor([[0, 0, 0, 1, -1], [1, 1, 0, 0, 1]], dtype=torch.int32)  # row 2 begins with the id before
    assert flash.document_bounds(doc_ids).tolist() == [0, 3, 4, 5, 7, 9, 10]
    assert flash.layout(Mask(window=3), 5, 5, CPU) is None


def test_flash_refuses_a_written_mask():
    with pytest.raises(ValueError, match="takes no dense mask"):
        attend(*random_qkv(1, 1, 1, 2, 2, 2), Mask(dense=torch.ones(1, 1, 2, 2).bool()), "flash")


def test_flash_and_flex_write_no_mask_of_all_pairs(monkeypatch):
    monkeypatch.setattr(Mask, "boolean", lambda *_: pytest.fail("a mask of all pairs was written"))
    for name in ("flash", "flex"):
        attend(*random_qkv(2, 2, 1, 6, 6, 4), Mask(oracles.random_documents(2, 6), 3), name)


# ---- which one


def chosen(dtype=torch.float32, device=CPU, mask=None, T=128, head_dim=64) -> str:
    return choose(mask or Mask(), T, T, head_dim, dtype, device)


def test_on_a_cpu_sdpa_but_for_short_bfloat16():
    for S, dtype, fast in ((512, torch.bfloat16, True), (513, torch.bfloat16, False), (128, torch.float32, False)):
        assert reference_is_fastest(Mask(), S, S, 64, dtype, CPU) == fast
        assert chosen(dtype, T=S) == ("reference" if fast else "sdpa")
    assert not reference_is_fastest(Mask(), 128, 128, 64, torch.bfloat16, CUDA)
    long = Mask(torch.zeros(1, 4096))
    assert chosen(mask=long, T=4096) == "sdpa"  # never flex, which takes seconds to compile there and cannot train


def test_on_a_gpu_flash_where_it_is_installed(monkeypatch):
    packed, written = Mask(torch.zeros(1, 4096)), Mask(dense=torch.ones(1, 1, 4096, 4096).bool())
    monkeypatch.setattr(flex, "installed", lambda: True)
    assert {chosen(dtype, CUDA, mask) for dtype in (torch.bfloat16, torch.float16) for mask in (Mask(), packed)} == {
        "flash"
    }
    assert chosen(torch.float32, CUDA) == chosen(torch.bfloat16, CUDA, head_dim=512) == "sdpa"
    assert chosen(torch.bfloat16, CUDA, written, T=4096) == "sdpa"
    monkeypatch.setattr(flash, "installed", lambda: False)
    assert chosen(torch.bfloat16, CUDA, packed, T=4096) == chosen(torch.float32, CUDA, Mask(window=9), T=1024) == "flex"
    assert chosen(torch.bfloat16, CUDA, packed, T=1023) == chosen(torch.bfloat16, CUDA, T=4096) == "sdpa"
    monkeypatch.setattr(flex, "installed", lambda: False)
    assert chosen(torch.bfloat16, CUDA, packed, T=4096) == "sdpa"


def test_use_holds_for_everything_inside_and_ends(monkeypatch):
    called = []
    one = BACKENDS["reference"]
    spy = one._replace(attend=lambda *args: called.append(1) or one.attend(*args))
    monkeypatch.setitem(BACKENDS, "reference", spy)
    qkv = random_qkv(1, 2, 2, 4, 4, 2)
    with use("reference"):
        attend(*qkv)
        attend(*qkv, Mask(group=2))  # halves of heads: one part, and three
        with use("sdpa"):
            attend(*qkv)
    attend(*qkv)
    assert len(called) == 5
    with pytest.raises(ValueError, match="attention should be one of auto, reference, sdpa, flash, flex, found 'fast'"):
        use("fast").__enter__()


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch):
    for name in ("auto", "reference", "sdpa"):
        check(name, torch.float32, CPU, training=True)
    check("flex", torch.float32, CPU, training=False)
    check("flash", torch.bfloat16, CUDA, training=True)
    with pytest.raises(ValueError, match="attention by flex trains on a CUDA GPU only, found cpu: choose auto or sdpa"):
        check("flex", torch.float32, CPU, training=True)
    with pytest.raises(ValueError, match=r"pip install .* found cuda, float32, package installed"):
        check("flash", torch.float32, CUDA, training=True)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install .* found cpu, bfloat16, package not installed"):
        check("flash", torch.bfloat16, CPU, training=True)


# ---- in the model


def test_the_model_gives_the_same_by_every_backend(backend):
    torch.manual_seed(1)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 29, "sliding_window": 5}
    model = Transformer(ModelArgs(**shape)).double()
    tokens, doc_ids = torch.randint(0, 29, (3, 17)), oracles.random_documents(3, 17)
    with torch.no_grad():
        expected = model(tokens, doc_ids=doc_ids)
        with backends.use(backend):
            # logits are of size 1, and go through some hundred roundings
            torch.testing.assert_close(model(tokens, doc_ids=doc_ids), expected, atol=1e-10, rtol=0)

"""Shifted sparse attention: against its dense mask, and that nothing comes from later tokens."""

import sys

import pytest
import torch
from helpers import attention_errors as oracles
from helpers import flash_stand_in
from helpers.attention_errors import random_qkv
from helpers.tiny_training_run import SHAPE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention.backends import Mask, ShiftedSparse, attend
from model import Transformer
from model_args import ModelArgs

TIGHT = 1e-12  # float64, sums of a few dozen products of size 1

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
ANY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _flash_stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in.package())


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])
@ANY
@given(
    B=st.integers(1, 2),
    heads=st.sampled_from([(2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (5, 5), (6, 3), (6, 2), (9, 3), (4, 1)]),
    T=st.integers(1, 21),
    half_group=st.integers(1, 6),
    window=st.integers(1, 14) | st.none(),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_its_dense_mask(backend, B, heads, T, half_group, window, packed, seed):
    """Values and gradients; rows that are no multiple of a group, odd numbers of heads, of key heads and of groups."""
    H, K = heads
    assert oracles.shifted_sparse_error(backend, 2 * half_group, B, H, K, T, 4, window, packed, seed) < TIGHT


def test_its_dense_mask_by_flex():
    """Which has no backward pass on a CPU, and is slow there."""
    assert oracles.shifted_sparse_error("flex", 4, gradients=False) < TIGHT
    assert oracles.shifted_sparse_error("flex", 6, K=1, window=5, packed=True, gradients=False) < TIGHT


def test_full_attention_is_told_from_it():
    def full(q, k, v, mask):
        return attend(q, k, v, Mask(mask.doc_ids, mask.window))

    assert oracles.shifted_sparse_error(full, group=4) > 0.1
    assert oracles.shifted_sparse_error(full, group=32) < TIGHT  # one group, of which half is more than the row


# ---- no leak


def rolled(q, k, v, mask):
    """As published without flash-attn: the second half of the heads rolled around by half a group, plain causal groups,
    and rolled back. The last half group and the first are then one group, in this order."""
    B, H, T, D = q.shape
    G = mask.group
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))

    def shifted(x, by):
        return torch.cat([x[:, : H // 2], x[:, H // 2 :].roll(by, dims=2)], dim=1)

    q, k, v = (shifted(x, -G // 2).reshape(B, H * T // G, G, D) for x in (q, k, v))
    return shifted(attend(q, k, v).view(B, H, T, D), G // 2)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])
@pytest.mark.parametrize("T", [16, 19])
def test_nothing_comes_from_later_tokens(backend, T):
    assert oracles.leak(lambda *args: attend(*args, backend), group=8, T=T) == 0


def test_rolling_the_row_around_leaks():
    assert oracles.leak(rolled, group=8) > 0.01
    assert oracles.shifted_sparse_error(rolled, group=8, T=16) > 0.1
    q, k, v = random_qkv(1, 4, 2, 16, 16, 4)
    inside = attend(q, k, v, Mask(group=8))[:, :, 4:12] - rolled(q, k, v, Mask(group=8))[:, :, 4:12]
    assert inside.abs().max() < TIGHT  # the groups that are not torn are the same


# ---- what it cannot do


@pytest.mark.parametrize("group", [-4, 0, 1, 7])
def test_groups_that_cannot_be_halved_are_refused(group):
    with pytest.raises(ValueError, match=f"s2_group should be an even number, 2 or more, found {group}"):
        ShiftedSparse(group)
    with pytest.raises(ValueError, match="should be an even number"):
        attend(*random_qkv(1, 2, 2, 8, 8, 4), Mask(group=group))


def test_a_single_head_and_a_written_mask_are_refused():
    with pytest.raises(ValueError, match="needs n_heads of 2 or more, found 1"):
        attend(*random_qkv(1, 1, 1, 8, 8, 4), Mask(group=4))
    with pytest.raises(ValueError, match="is for training"):
        attend(*random_qkv(1, 2, 1, 8, 8, 4), Mask(dense=torch.ones(1, 1, 8, 8).bool(), group=4))


# ---- in the model


def toy(**changes) -> tuple[Transformer, torch.Tensor]:
    model = Transformer(ModelArgs(**SHAPE | changes)).double()
    return model, torch.randint(0, 29, (2, 24))


def test_only_training_on_long_rows_attends_in_groups():
    model, tokens = toy()
    full = model.eval()(tokens)
    model.shifted_sparse = ShiftedSparse(group=8, min_len=20)
    assert torch.equal(model(tokens), full)
    assert torch.equal(model(tokens, cache=model.make_cache(2, 24)), full)
    model.train()
    assert torch.equal(model(tokens[:, :19]), model.eval()(tokens[:, :19]))
    assert not torch.allclose(model.train()(tokens), full)
    assert torch.allclose(model(tokens)[:, :4], full[:, :4])  # half a group is alone in both halves of the heads
    assert torch.equal(model(tokens, cache=model.make_cache(2, 24)), full)


def gradients(model: Transformer, tokens: torch.Tensor, doc_ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss, _ = model(tokens, tokens.roll(-1, 1), doc_ids=doc_ids)
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters()]


def test_gradient_checkpointing_changes_nothing():
    model, tokens = toy()
    model.shifted_sparse = ShiftedSparse(8)
    doc_ids = oracles.random_documents(2, 24)
    plain = gradients(model, tokens, doc_ids)
    model.gradient_checkpointing = True
    for a, b in zip(plain, gradients(model, tokens, doc_ids), strict=True):
        assert torch.equal(a, b)


def test_compiled_whole_and_checkpointed_changes_nothing():
    """Traced without a break; that compiled code computes what was traced is the compiler's affair."""
    model, tokens = toy()
    model.shifted_sparse = ShiftedSparse(16)
    doc_ids = oracles.random_documents(2, 24)
    plain = gradients(model, tokens, doc_ids)
    model.gradient_checkpointing = True
    model.compile(fullgraph=True, backend="aot_eager")
    for a, b in zip(plain, gradients(model, tokens, doc_ids), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)  # the loss is a sum of some hundred

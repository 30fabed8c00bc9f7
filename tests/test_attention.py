"""Both back-ends against loops over single queries, in float64."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import BACKENDS, Mask, attend, causal_mask, fast_reference


def brute_force(q, k, v, visible) -> torch.Tensor:
    """Attention (B, H, T, D) by loops; `visible` (B, T, S) bool."""
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            kv = h // (q.shape[1] // k.shape[1])
            rows = reference.attention(list(q[b, h]), list(k[b, kv]), list(v[b, kv]), visible[b].tolist())
            out[b, h] = torch.stack(rows)
    return out


def random_qkv(B, H, K, T, S, D, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, D), (B, K, S, D), (B, K, S, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    K=st.integers(1, 3),
    group=st.integers(1, 3),
    T=st.integers(1, 7),
    D=st.sampled_from([2, 4, 6]),
    seed=st.integers(0, 99),
)
def test_causal(backend, B, K, group, T, D, seed):
    q, k, v = random_qkv(B, K * group, K, T, T, D, seed=seed)
    visible = torch.ones(T, T).tril().bool().expand(B, T, T)
    torch.testing.assert_close(attend(q, k, v, backend=backend), brute_force(q, k, v, visible), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    group=st.integers(1, 3),
    T=st.integers(1, 5),
    past=st.integers(0, 5),
    per_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_mask(backend, B, group, T, past, per_row, seed):
    S = T + past
    q, k, v = random_qkv(B, 2 * group, 2, T, S, 4, seed=seed)
    mask = torch.rand(B if per_row else 1, 1, T, S, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[..., 0] = True  # no query looks at nothing
    expected = brute_force(q, k, v, mask[:, 0].expand(B, T, S))
    torch.testing.assert_close(attend(q, k, v, Mask(dense=mask), backend), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_query_without_mask_sees_every_key(backend):
    q, k, v = random_qkv(2, 4, 2, 1, 6, 8)
    expected = brute_force(q, k, v, torch.ones(2, 1, 6).bool())
    torch.testing.assert_close(attend(q, k, v, backend=backend), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("T, S", [(2, 5), (5, 2)])
def test_unequal_lengths_without_mask_are_refused(T, S):
    with pytest.raises(ValueError, match=f"{T} queries over {S} keys needs an explicit mask"):
        attend(*random_qkv(1, 1, 1, T, S, 2))


def test_gradients_of_the_backends_agree():
    mask = causal_mask(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]), None, 5, torch.device("cpu"))
    grads = []
    for backend in BACKENDS:
        leaves = [x.requires_grad_() for x in random_qkv(2, 6, 2, 5, 5, 4)]
        attend(*leaves, Mask(dense=mask), backend).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_bfloat16_stays_near_float64(backend):
    q, k, v = random_qkv(2, 4, 2, 33, 33, 16, torch.bfloat16)
    out = attend(q, k, v, backend=backend)
    assert out.dtype == torch.bfloat16
    exact = attend(q.double(), k.double(), v.double())
    # weights and output are rounded to 8 bits each; values are of size 1
    torch.testing.assert_close(out.double(), exact, atol=0.03, rtol=0)


def test_auto_takes_plain_matmuls_for_short_bfloat16_on_cpu_only():
    q = torch.zeros(1, 1, 2, 2)
    assert fast_reference(q.bfloat16(), 512)
    assert not fast_reference(q.bfloat16(), 513)
    assert not fast_reference(q, 128)
    assert not fast_reference(q.bfloat16().to("meta"), 128)


@given(
    doc_ids=st.lists(st.lists(st.integers(-1, 2), min_size=6, max_size=6), min_size=1, max_size=3) | st.none(),
    window=st.integers(1, 8) | st.none(),
)
def test_mask_by_its_definition(doc_ids, window):
    ids = None if doc_ids is None else torch.tensor(doc_ids, dtype=torch.int32)
    mask = causal_mask(ids, window, 6, torch.device("cpu"))
    if doc_ids is None and window is None:
        assert mask is None
        return
    rows = doc_ids or [[0] * 6]
    assert mask.shape == (len(rows), 1, 6, 6)
    for b, row in enumerate(rows):
        for i in range(6):
            for j in range(6):
                near = window is None or i - j < window
                assert mask[b, 0, i, j].item() == (j <= i and row[i] == row[j] and near)

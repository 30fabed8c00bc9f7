"""Log-probabilities of targets, made in blocks, against log_softmax on all logits at once."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_loss import LargestTensor, random_problem

from loss import IGNORE, linear_log_probs


def plain(hidden, weight, targets):
    log_p = (hidden @ weight.T).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets == IGNORE, 0.0, log_p)


@settings(max_examples=100, deadline=None)
@given(
    N=st.integers(0, 23),
    V=st.integers(1, 19),
    d=st.integers(1, 6),
    block_rows=st.integers(1, 30),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 999),
)
@example(N=7, V=5, d=3, block_rows=3, ignored=1.0, seed=0)  # no target at all
def test_equals_log_softmax_in_value_and_gradients(N, V, d, block_rows, ignored, seed):
    hidden, weight, targets, _ = random_problem(N, V, d, seed, ignored)
    ours, theirs = linear_log_probs(hidden, weight, targets, block_rows), plain(hidden, weight, targets)
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-12)
    upstream = torch.randn(N, dtype=torch.float64)  # another one for each token
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight), upstream) for x in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_only_what_wants_a_gradient_gets_one(which):
    hidden, weight, targets, _ = random_problem(5, 7, 3, 0)
    frozen, wanted = (hidden, weight)[1 - which].requires_grad_(False), (hidden, weight)[which]
    linear_log_probs(hidden, weight, targets).square().sum().backward()
    assert frozen.grad is None
    expected = torch.autograd.grad(plain(hidden, weight, targets).square().sum(), wanted)[0]
    torch.testing.assert_close(wanted.grad, expected)


def test_bfloat16_hidden_states_and_a_float32_head():
    hidden, weight, targets, _ = random_problem(300, 50, 32, 0)
    exact = torch.autograd.grad(plain(hidden, weight, targets).sum(), (hidden, weight))
    h, w = hidden.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    log_p = linear_log_probs(h, w, targets, block_rows=64)
    log_p.sum().backward()
    assert (log_p.dtype, h.grad.dtype, w.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for got, want in zip((h.grad, w.grad), exact):
        assert (got.double() - want).norm() < 0.02 * want.norm()  # eight bits a number


def test_all_logits_never_exist():
    N, V, d, block = 96, 1000, 4, 8
    hidden, weight, targets, _ = random_problem(N, V, d, 0)
    with LargestTensor() as blockwise:
        linear_log_probs(hidden, weight, targets, block).sum().backward()
    assert blockwise.numel == block * V  # V x d is smaller

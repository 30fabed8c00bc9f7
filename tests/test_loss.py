"""The blockwise loss against torch's own cross-entropy on all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from loss import IGNORE, linear_cross_entropy


def random_problem(N, V, d, seed, ignored=0.3):
    """Hidden states (N, d), head (V, d), targets (N,) some of them ignored, weights (N,) some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = IGNORE
    weights = torch.rand(N, generator=generator) * (torch.rand(N, generator=generator) < 0.8)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, weights


def plain(hidden, weight, targets, loss_weights=None):
    each = F.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORE)
    return (each if loss_weights is None else each * loss_weights.double()).sum()


@settings(max_examples=100, deadline=None)
@given(
    N=st.integers(0, 23),
    V=st.integers(1, 19),
    d=st.integers(1, 6),
    block_rows=st.integers(1, 30),
    weighted=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 999),
)
@example(N=1, V=5, d=3, block_rows=1024, weighted=False, ignored=0.0, seed=0)
@example(N=7, V=5, d=3, block_rows=3, weighted=True, ignored=1.0, seed=0)  # no target at all
def test_equals_cross_entropy_in_value_and_gradients(N, V, d, block_rows, weighted, ignored, seed):
    hidden, weight, targets, weights = random_problem(N, V, d, seed, ignored)
    weights = weights if weighted else None
    loss, count = linear_cross_entropy(hidden, weight, targets, weights, block_rows)
    expected = plain(hidden, weight, targets, weights)
    assert count.dtype == torch.int64
    assert count.item() == (targets != IGNORE).sum().item()
    torch.testing.assert_close(loss, expected, atol=1e-11, rtol=1e-12)
    ours = torch.autograd.grad(3.7 * loss, (hidden, weight))
    theirs = torch.autograd.grad(3.7 * expected, (hidden, weight))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_head_has_no_gradient_and_the_rest_the_same(frozen):
    hidden, weight, targets, weights = random_problem(40, 19, 5, 0)
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, weights, 7)[0], (hidden, weight))
    inputs = [hidden, weight]
    inputs[frozen] = inputs[frozen].detach()
    with Products() as products:
        loss, _ = linear_cross_entropy(*inputs, targets, weights, 7)
        (alone,) = torch.autograd.grad(loss, inputs[1 - frozen])
    assert torch.equal(alone, both[1 - frozen])
    assert products.n == 2 * 6  # of each of 6 blocks the logits and the one gradient that is wanted
    with torch.no_grad(), Products() as products:
        linear_cross_entropy(*inputs, targets, weights, 7)
    assert products.n == 6


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


def test_large_logits_do_not_overflow():
    hidden, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[300.0], [0.0]])
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(600.0)


@pytest.mark.parametrize("which", [0, 1])
def test_only_what_wants_a_gradient_gets_one(which):
    hidden, weight, targets, _ = random_problem(5, 7, 3, 0)
    frozen, wanted = (hidden, weight)[1 - which].requires_grad_(False), (hidden, weight)[which]
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert frozen.grad is None
    expected = torch.autograd.grad(plain(hidden, weight, targets), wanted)[0]
    torch.testing.assert_close(wanted.grad, expected)


def test_without_gradients():
    hidden, weight, targets, _ = random_problem(5, 7, 3, 0)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets))


def test_bfloat16_hidden_states_and_a_float32_head():
    hidden, weight, targets, _ = random_problem(300, 50, 32, 0)
    expected = plain(hidden, weight, targets)
    exact = torch.autograd.grad(expected, (hidden, weight))
    h, w = hidden.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    loss, _ = linear_cross_entropy(h, w, targets, block_rows=64)
    (loss / 777).backward()
    assert (loss.dtype, h.grad.dtype, w.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=0.005)
    for got, want in zip((h.grad, w.grad), exact):
        got = got.double() * 777
        assert (got - want).norm() < 0.02 * want.norm()  # eight bits a number
        # errors average out over a tensor, unless 1/777 itself was rounded to bfloat16 (0.2 % too small)
        assert (got * want).sum() / want.square().sum() == pytest.approx(1, abs=0.001)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_all_logits_never_exist():
    N, V, d, block = 96, 1000, 4, 8
    hidden, weight, targets, weights = random_problem(N, V, d, 0)
    with LargestTensor() as plainly:
        plain(hidden, weight, targets, weights).backward()
    assert plainly.numel == N * V  # so the probe sees what it should
    with LargestTensor() as blockwise:
        linear_cross_entropy(hidden, weight, targets, weights, block)[0].backward()
    assert blockwise.numel == block * V  # V x d is smaller


@pytest.mark.parametrize("block", [0, 3])
def test_the_loss_of_each_target(block):
    hidden, weight = torch.randn(8, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets, weights = torch.tensor([1, IGNORE, 3, 0, 10, IGNORE, 5, 5]), torch.rand(8)
    loss, losses = linear_cross_entropy(hidden, weight, targets, weights, block, token_losses=True)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), atol=1e-6, rtol=1e-6)  # float32
    assert not losses.requires_grad and losses[1] == losses[5] == 0
    assert loss.item() == pytest.approx((expected * weights).sum().item(), rel=1e-6)
    loss.backward()
    gradient = torch.autograd.grad((expected * weights).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_z_loss_is_in_the_gradient_and_not_in_the_value(dtype, tolerance):
    hidden, weight, targets, weights = random_problem(20, 30, 8, 3)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    value = linear_cross_entropy(hidden, weight, targets, weights, 7)[0]
    loss, _ = linear_cross_entropy(hidden, weight, targets, weights, 7, z_loss=0.3)
    assert torch.equal(loss, value)
    ours = torch.autograd.grad(loss, (hidden, weight))
    log_z = (hidden @ weight.T).logsumexp(-1)
    scale = (targets != -100) * (1.0 if weights is None else weights)
    theirs = torch.autograd.grad(
        plain(hidden, weight, targets, weights) + 0.3 * (scale * log_z**2).sum(), (hidden, weight)
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)

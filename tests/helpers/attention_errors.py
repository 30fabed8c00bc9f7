"""How far attention is from what it should be: each function makes random inputs, and returns the largest error of a
back-end's outputs (and of its gradients, where told so) against a formula written in the dumbest way."""

import math
from collections.abc import Callable

import torch

from attention import backends
from attention.backends import Mask


def random_qkv(B, H, K, T, S, D, dtype=torch.float64, seed=0) -> list[torch.Tensor]:
    """q (B, H, T, D), k and v (B, K, S, D)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, D), (B, K, S, D), (B, K, S, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def random_documents(B: int, T: int, seed: int = 0) -> torch.Tensor:
    """doc_ids (B, T) int32 of runs of a few tokens; some ids come back later in the row, as another document."""
    generator = torch.Generator().manual_seed(seed)
    changes = torch.rand(B, T, generator=generator) < 0.3
    return (changes.cumsum(1) % 3 - 1).int()


def brute_force(q, k, v, visible) -> torch.Tensor:
    """Attention (B, H, T, D) by loops over single queries; `visible` (B, H, T, S) bool."""
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            keys, values = (x[b, h // (q.shape[1] // k.shape[1])] for x in (k, v))
            for t, query in enumerate(q[b, h]):
                seen = [j for j in range(len(keys)) if visible[b, h, t, j]]
                powers = [math.exp(query.dot(keys[j]).item() / math.sqrt(len(query))) for j in seen]
                out[b, h, t] = sum(power / sum(powers) * values[j] for power, j in zip(powers, seen))
    return out


def by_dense_mask(q, k, v, visible) -> torch.Tensor:
    """Attention (B, H, T, D), differentiable, over all pairs; `visible` (B, H, T, S) bool, no row of it empty."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def visible_pairs(B, H, T, S, doc_ids=None, window=None, group=None) -> torch.Tensor:
    """Which keys each query of each head may see, (B, H, T, S) bool, by the definitions, one pair at a time."""
    seen = torch.zeros(B, H, T, S, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            i = S - T + t
            for j in range(i + 1):
                if window is not None and i - j >= window:
                    continue
                if doc_ids is not None and len(set(doc_ids[b, j : i + 1].tolist())) > 1:
                    continue
                for h in range(H):
                    shift = group // 2 if group and h >= H // 2 else 0
                    seen[b, h, t, j] = group is None or (i + shift) // group == (j + shift) // group
    return seen


def error(
    backend: str | Callable[..., torch.Tensor],
    shape: tuple[int, int, int, int, int, int],
    mask: Mask,
    visible: torch.Tensor,
    seed: int = 0,
    gradients: bool = True,
) -> float:
    """Largest error in float64, over outputs and gradients, of a back-end (or of a function of q, k, v and a mask)
    against attention by a dense mask over all pairs; infinite where anything is not finite. `shape`: B, H, K, T, S, D.
    """
    ours = [x.requires_grad_(gradients) for x in random_qkv(*shape, seed=seed)]
    theirs = [x.detach().clone().requires_grad_(gradients) for x in ours]
    out = backends.attend(*ours, mask, backend) if isinstance(backend, str) else backend(*ours, mask)
    expected = by_dense_mask(*theirs, visible)
    pairs = [(out, expected)]
    if gradients:
        weights = torch.randn_like(expected)
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        pairs += [(a.grad, b.grad) for a, b in zip(ours, theirs)]
    worst = max((a - b).abs().max().item() for a, b in pairs)
    return worst if math.isfinite(worst) else math.inf


def causal_error(backend: str, B=2, H=6, K=2, T=9, D=4, seed=0, gradients=True) -> float:
    """Plain causal attention."""
    return error(backend, (B, H, K, T, T, D), Mask(), visible_pairs(B, H, T, T), seed, gradients)


def packed_error(backend: str, B=2, H=6, K=2, T=9, D=4, window=None, seed=0, gradients=True) -> float:
    """Packed documents, perhaps in a sliding window."""
    doc_ids = random_documents(B, T, seed)
    visible = visible_pairs(B, H, T, T, doc_ids, window)
    return error(backend, (B, H, K, T, T, D), Mask(doc_ids, window), visible, seed, gradients)


def lower_right_error(backend, B=2, H=6, K=2, T=3, S=8, D=4, window=None, seed=0, gradients=True) -> float:
    """A chunk of queries after keys that were there before; the last query stands at the last key."""
    visible = visible_pairs(B, H, T, S, window=window)
    return error(backend, (B, H, K, T, S, D), Mask(window=window), visible, seed, gradients)


def shifted_sparse_error(
    backend, group: int, B=2, H=4, K=2, T=11, D=4, window=None, packed=False, seed=0, gradients=True
) -> float:
    """Shifted sparse attention against its dense mask."""
    doc_ids = random_documents(B, T, seed) if packed else None
    visible = visible_pairs(B, H, T, T, doc_ids, window, group)
    return error(backend, (B, H, K, T, T, D), Mask(doc_ids, window, group=group), visible, seed, gradients)


def leak(attend: Callable[..., torch.Tensor], group: int, H=4, K=2, T=16, D=4) -> float:
    """How much the outputs of each position depend on later keys and values, by attend(q, k, v, mask): the largest
    gradient there."""
    q, k, v = (x.requires_grad_() for x in random_qkv(1, H, K, T, T, D))
    out = attend(q, k, v, Mask(group=group))
    worst = 0.0
    for t in range(T - 1):
        for grad in torch.autograd.grad(out[:, :, t].square().sum(), (k, v), retain_graph=True):
            worst = max(worst, grad[:, :, t + 1 :].abs().max().item())
    return worst

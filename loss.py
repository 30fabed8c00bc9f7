"""Cross-entropy directly from hidden states: the logits of all tokens never exist at once.

For a vocabulary of 64 k the logits and their gradient are the largest tensors of a training step by far. Here one block
of rows at a time goes through head, softmax and backward, so memory holds one block. The gradient of a *sum* of losses
depends on the upstream gradient by a scalar factor only, so it is computed in the forward pass.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORE = -100  # a target that is not trained on: no token id, so it cannot hide a real one (0 or pad would)
# Number of logits that exist at a time: 32 MiB of float32, about what the last cache of a processor holds. Every block
# also reads and writes the gradient of the whole head, so that smaller ones are slower with a large vocabulary.
BLOCK_SIZE = 2**23


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    block_rows: int = 0,
    token_losses: bool = False,
    z_loss: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum over tokens of `loss_weight * -log softmax(hidden @ weight.T)[target]`, and the number of targets
    or, with `token_losses`, the loss of each target.

    hidden (..., d) in the compute dtype, weight (V, d), targets (...) int64 with -100 where ignored, loss_weights (...)
    float32 or None. block_rows: rows of logits that exist at a time; 0: as many as make BLOCK_SIZE of them. The sum is
    a float32 scalar, differentiable in hidden and weight. The number is an int64 scalar; the losses are float32 (...),
    unweighted, detached, 0 where the target is ignored. With `z_loss`, gradients are those of the sum of
    `loss_weight * z_loss * log(Z)²` besides, Z the sum of exp(logits) (PaLM, arXiv:2204.02311, section 5); the values
    leave it out, so that losses with and without it compare. group: processes that have V rows each of a larger
    vocabulary, in order of rank; all get the same values, and the gradient of hidden is this process's share of a sum.
    """
    block_rows = block_rows or max(64, BLOCK_SIZE // len(weight))
    is_target = targets != IGNORE
    scale = is_target.float() if loss_weights is None else is_target * loss_weights.float()
    needs_grad = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]  # a frozen head needs none
    flat = hidden.flatten(0, -2), weight, targets.clamp(min=0).flatten(), scale.flatten()  # (N, d), (V, d), (N,), (N,)
    loss, losses = _LinearCrossEntropy.apply(*flat, block_rows, *needs_grad, z_loss, group)
    return loss, losses.view_as(targets) * is_target if token_losses else is_target.sum()


def _add_product(total: torch.Tensor | None, d: torch.Tensor, h: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return total + dᵀ h, in place, for d (n, V), h (n, d) and total (V, d) of `dtype` or None."""
    if total is None:
        return (d.t() @ h).to(dtype)
    # in one call where it can be: a product of its own is as large as the head, and would be written and read
    return total.addmm_(d.t(), h) if dtype == h.dtype else total.add_((d.t() @ h).to(dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of the losses of N tokens, and the loss of each; both gradients are computed in `forward`."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, block_rows, needs_hidden, needs_weight, z_loss, group):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w = weight.to(hidden.dtype)  # (V, d)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden, grad_weight, losses = [], None, []
        targets, mine = _own_rows(targets, len(w), group)
        for h, t, s, own in zip(*(x.split(block_rows) for x in (hidden, targets, scale, mine))):
            logits = F.linear(h, w).to(wide)  # (n, V)
            t, s, own = t[:, None], s[:, None].to(wide), own[:, None]
            lse, of_t = _over_vocabulary(_logsumexp(logits), logits.gather(1, t) * own, group)
            log_p = of_t - lse  # (n, 1)
            total = total - (log_p * s).sum()
            losses.append(-log_p[:, 0])
            if needs_hidden or needs_weight:
                # d loss / d logits = s * (softmax - onehot), the target's column separately: p - 1 needs float32
                of_target = log_p.expm1() * s  # (n, 1)
                if z_loss:  # d log(Z)² / d logits = 2 log(Z) softmax
                    of_z = 2 * z_loss * lse * s
                    of_target, s = of_target + log_p.exp() * of_z, s + of_z
                d = _exp(logits.sub_(lse)).mul_(s).to(h.dtype)  # (n, V), in the memory of the logits
                d.scatter_(1, t, torch.where(own, of_target.to(h.dtype), d.gather(1, t)))
                if needs_hidden:
                    grad_hidden.append(d @ w)  # (n, d)
                if needs_weight:
                    grad_weight = _add_product(grad_weight, d, h, weight.dtype)  # (V, d)
        ctx.save_for_backward(torch.cat(grad_hidden) if grad_hidden else None, grad_weight)
        losses = torch.cat(losses)  # (N,)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx, upstream, _):
        # a scalar leaves the dtype as it is; cast to bfloat16 first, its rounding would scale the whole gradient
        of_hidden, of_weight = (None if grad is None else grad * upstream for grad in ctx.saved_tensors)
        return of_hidden, of_weight, *[None] * 7


def _exp(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x), in the memory of `x` where it can be. Compiled for a CPU, exp2 takes half of the time of exp."""
    return (x * (1 / math.log(2))).exp2() if torch.compiler.is_compiling() else x.exp_()


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm (n, 1) of the sum of exp(logits) over each row of `logits` (n, V)."""
    if not torch.compiler.is_compiling():
        return logits.logsumexp(dim=-1, keepdim=True)
    largest = logits.amax(dim=-1, keepdim=True)
    return largest + _exp(logits - largest).sum(dim=-1, keepdim=True).log()


def _own_rows(targets: torch.Tensor, rows: int, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the targets (N,) as numbers of this process's rows, 0 where it has none, and where it has one."""
    if group is None:
        return targets, torch.ones_like(targets, dtype=torch.bool)
    targets = targets - rows * group.rank()
    mine = (targets >= 0) & (targets < rows)
    return targets * mine, mine


def _over_vocabulary(
    lse: torch.Tensor, of_target: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log(Z) and the logit of each target, (n, 1), over the whole vocabulary, from those of each process."""
    if group is None:
        return lse, of_target
    both = torch.cat([lse, of_target], dim=1)  # (n, 2)
    parts = [torch.empty_like(both) for _ in range(group.size())]
    dist.all_gather(parts, both, group=group)
    lse, of_target = torch.stack(parts).unbind(-1)  # (processes, n) each
    return lse.logsumexp(0)[:, None], of_target.sum(0)[:, None]


def linear_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, block_rows: int = 0
) -> torch.Tensor:
    """Return `log softmax(hidden @ weight.T)[target]` of each token, (N,) float32 or wider; 0 where it is ignored.

    hidden (N, d), weight (V, d), targets (N,) and block_rows as in `linear_cross_entropy`. The upstream gradient of
    each token is known in the backward pass only, so each block of logits is computed a second time there.
    """
    block_rows = block_rows or max(64, BLOCK_SIZE // len(weight))
    return _LinearLogProbs.apply(hidden, weight, targets.clamp(min=0), targets != IGNORE, block_rows)


class _LinearLogProbs(torch.autograd.Function):
    """Log-probabilities of N tokens; the logits are computed again in `backward`."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, is_target, block_rows):
        w, lse, of_target = weight.to(hidden.dtype), [], []
        for h, t in zip(hidden.split(block_rows), targets.split(block_rows)):
            logits = F.linear(h, w).to(torch.promote_types(h.dtype, torch.float32))  # (n, V)
            lse.append(_logsumexp(logits)[:, 0])
            of_target.append(logits.gather(1, t[:, None])[:, 0])  # (n,)
        lse = torch.cat(lse)  # (N,)
        log_p = (torch.cat(of_target) - lse) * is_target
        ctx.save_for_backward(hidden, weight, targets, is_target, lse, log_p)
        ctx.block_rows = block_rows
        return log_p

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, *_ = ctx.saved_tensors
        w, of_hidden, of_weight = weight.to(hidden.dtype), [], None
        columns = (*ctx.saved_tensors[2:], upstream)  # (N,) each
        for h, t, is_target, lse, log_p, u in zip(*(x.split(ctx.block_rows) for x in (hidden, *columns))):
            # d log p / d logits = onehot - softmax, the target's column separately: 1 - p needs float32
            t, u = t[:, None], (u * is_target)[:, None]  # (n, 1) each
            logits = F.linear(h, w).to(u.dtype)  # (n, V)
            d = _exp(logits.sub_(lse[:, None])).mul_(-u).to(h.dtype)  # (n, V), in the memory of the logits
            d.scatter_(1, t, (-log_p[:, None].expm1() * u).to(h.dtype))
            if ctx.needs_input_grad[0]:
                of_hidden.append(d @ w)  # (n, d)
            if ctx.needs_input_grad[1]:
                of_weight = _add_product(of_weight, d, h, weight.dtype)  # (V, d)
        return torch.cat(of_hidden) if of_hidden else None, of_weight, None, None, None

"""Muon: momentum whose update is orthogonalized."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from hardware import has_bfloat16
from optim.adamw import adamw
from optim.args import OptimArgs


def muon(parameters: dict[str, list[nn.Parameter]], args: OptimArgs) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices among `parameters` (role -> parameters) and AdamW for all others."""
    others = adamw(parameters | {"matrix": []}, args)
    matrices = parameters["matrix"]
    return [Muon(matrices, args.muon_lr, args.weight_decay, args.momentum), *others] if matrices else others


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan 2024, kellerjordan.github.io/posts/muon), for 2-D parameters.

    The update of a matrix (r, c) is scaled by 0.2 sqrt(max(r, c)), which gives it the root mean square of a typical
    AdamW update (Liu et al. 2025, arXiv:2502.16982), so that AdamW's learning rates and decay carry over. Matrices of
    one shape are orthogonalized together.

    `gather` makes a whole matrix of the part that this process holds, and `part(p, matrix)` the part of a whole matrix
    that belongs to `p`. Both do nothing where every process holds whole parameters; a backend sets them where not.
    """

    gather: Callable[[torch.Tensor], torch.Tensor] = staticmethod(lambda matrix: matrix)
    part: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = staticmethod(lambda p, matrix: matrix)

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(
                        f"Muon updates 2-D parameters only, found one of shape {tuple(p.shape)}: give it to AdamW"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                updates = torch.stack([self.gather(self._momentum(p, group["momentum"])) for p in params])  # (n, r, c)
                updates = orthogonalize(updates).to(params[0].dtype)
                # an orthogonal (r, c) has root mean square 1 / sqrt(max(r, c)); AdamW's updates have about 0.2
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(self.part(p, update), alpha=-scale)

    def _momentum(self, p: nn.Parameter, momentum: float) -> torch.Tensor:
        """Update the running mean of the gradients of `p`; return Nesterov's look-ahead of it, in the shape of `p`."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return approximately U Vᵀ for each matrix U S Vᵀ of `matrices` (n, r, c) by Newton-Schulz iteration, in bfloat16
    where the device has products in it, else in float32.

    The quintic's coefficients trade exactness for speed: singular values end in about [0.7, 1.2], not at 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    # the iteration is stable in bfloat16; a processor without its products would take several times as long in it
    x = matrices.to(torch.bfloat16 if has_bfloat16(matrices.device) else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the smaller Gram matrix
        x = x.mT
    # the Frobenius norm bounds the largest singular value: all start in [0, 1], where the iteration converges
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).contiguous()
    for _ in range(steps):
        # each singular value s becomes a s + b s^3 + c s^5
        gram = torch.bmm(x, x.mT)  # (n, r, r), r <= c
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

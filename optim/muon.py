"""Muon: momentum whose update is orthogonalised."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan 2024, kellerjordan.github.io/posts/muon), for 2-D parameters.

    The update of a matrix (r, c) is scaled by 0.2 sqrt(max(r, c)), which gives it the root mean square of a typical
    AdamW update (Liu et al. 2025, arXiv:2502.16982), so that AdamW's learning rates and decay carry over. Matrices of
    one shape are orthogonalised together.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon takes matrices, found a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in params])  # (n, r, c)
                updates = orthogonalize(updates).to(params[0].dtype)
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _momentum(self, p: nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)  # Nesterov


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly U Vᵀ for each matrix U S Vᵀ of `matrices` (n, r, c): Newton-Schulz in bfloat16, where it is stable.

    The quintic's coefficients trade exactness for speed: singular values land in about [0.7, 1.2], not on 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, r, r), r <= c
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

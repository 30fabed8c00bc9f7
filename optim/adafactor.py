"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235): second moments of a matrix from those of rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from optim.args import OptimArgs
from optim.groups import groups

TINY = 1e-30  # epsilon 1 of the paper: a gradient of zeros is divided by something
SMALLEST = 1e-3  # epsilon 2: parameters that begin at zero move, too


def adafactor(parameters: dict[str, list[nn.Parameter]], args: OptimArgs) -> list[torch.optim.Optimizer]:
    """Return one Adafactor for all `parameters` (role -> parameters), or none when there are none."""
    own = groups(parameters, args)
    return [Adafactor(own, args.lr)] if own else []


class Adafactor(torch.optim.Optimizer):
    """Adam without a first moment, whose second moments of an (r, c) matrix are r + c numbers (algorithm 4).

    Updates are clipped to a root mean square of 1 (section 6). With `relative`, the learning rate is a share of the
    root mean square of each parameter (section 8); else it means what AdamW's does. The decay of the schedule comes
    from outside: section 8's 1/sqrt(step) is `--optim.schedule inverse_sqrt`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.1,
        relative: bool = True,
        beta2_decay: float = 0.8,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.relative, self.beta2_decay = relative, beta2_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                size = max(SMALLEST, rms(p)) if self.relative else 1.0
                update = self._scaled(p)
                update.div_(max(1.0, rms(update)))
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)

    def _scaled(self, p: nn.Parameter) -> torch.Tensor:
        """Update the second moments of `p`; return its gradient divided by their square roots, in its shape."""
        state, square = self.state[p], p.grad.float().square().add_(TINY)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            if p.dim() < 2:
                state["square"] = torch.zeros_like(square)
            else:
                state["row"], state["column"] = square.new_zeros(len(p), 1), square.new_zeros(1, p.shape[1])
        state["step"] += 1
        new = state["step"].item() ** -self.beta2_decay  # 1 - beta2 of this step; 1 at the first, so no correction
        if p.dim() < 2:
            return p.grad * state["square"].lerp_(square, new).rsqrt()
        row = state["row"].lerp_(square.mean(1, keepdim=True), new)  # (r, 1)
        column = state["column"].lerp_(square.mean(0, keepdim=True), new)  # (1, c)
        # the estimate row column / mean(row), factor by factor: their product could underflow
        return p.grad * (row / row.mean()).rsqrt_() * column.rsqrt()


def rms(x: torch.Tensor) -> float:
    """Return the root mean square of a tensor."""
    return x.norm().item() / x.numel() ** 0.5

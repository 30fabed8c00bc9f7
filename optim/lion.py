"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): the sign of a momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from optim.args import OptimArgs
from optim.groups import groups


def lion(parameters: dict[str, list[nn.Parameter]], args: OptimArgs) -> list[torch.optim.Optimizer]:
    """Return one Lion for all `parameters` (role -> parameters), or none when there are none."""
    own = groups(parameters, args)
    return [Lion(own, args.lr, args.betas)] if own else []


class Lion(torch.optim.Optimizer):
    """All weights of a group move by the same amount, so one moment is enough: half of AdamW's state.

    `betas` are those of the update and of the momentum.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                update = state["momentum"].lerp(p.grad, 1 - group["betas"][0]).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                state["momentum"].lerp_(p.grad, 1 - group["betas"][1])

"""Linear layers that are trained with rounded weights: the base of BitNet's (bitnet.py) and of QAT's (qat.py).

The optimizer sees full weights; a forward pass computes with rounded ones, and the gradient passes the rounding
unchanged (straight-through, Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RoundedLinear(nn.Linear):
    """A linear layer in training; its weight (out, in) is the full one."""

    def __init__(self, base: nn.Linear, kind: str) -> None:
        """Take over the parameters of `base`; kind: name of the rounding, as config.json has it."""
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias, self.kind = base.weight, base.bias, kind

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class Straight(torch.autograd.Function):
    """The rounded value, with the gradient of the value as it was."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def kind_of_bits(model: nn.Module) -> str | None:
    """Return the kind of the layers of a model that are trained with rounded weights, None where there are none."""
    return next((module.kind for module in model.modules() if isinstance(module, RoundedLinear)), None)

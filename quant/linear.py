"""Frozen linear layers in 4 or 8 bits, with gradients to their input: the base of QLoRA (Dettmers 2023, 2305.14314).

nf4, fp4: blocks of 64 weights share a scale, each weight is one of 16 levels; bitsandbytes does the coding. With double
quantization the scales are kept in 8 bits too. int8: each output row has a scale of its own.
A layer is unpacked where it is used and again in the backward pass, so that no dense copy outlives its product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class QuantizedLinear(nn.Module):
    """In the place of a linear layer: `dequantize(dtype)` is its weight (out, in). Scales are kept as bytes, so that
    `model.to(bfloat16)` leaves them as they are."""

    kind: str
    double = False

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.origin = base.in_features, base.out_features, type(base)
        self.bias = base.bias

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (out, in)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dense(self, weight: torch.Tensor) -> nn.Linear:
        """A layer of the kind this one was made from, holding `weight`."""
        layer = self.origin(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """x Wᵀ, keeping nothing but the layer for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None

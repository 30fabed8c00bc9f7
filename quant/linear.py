"""Frozen linear layers in 4 or 8 bits, with gradients to their input: the base of QLoRA (Dettmers et al. 2023,
arXiv:2305.14314).

nf4, fp4: blocks of 64 weights share a scale, each weight is one of 16 levels; bitsandbytes encodes them. With double
quantization the scales are kept in 8 bits, too. int8: each output row has its own scale.
The weight is dequantized for the product and again in the backward pass, so that no dense copy stays in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class QuantizedLinear(nn.Module):
    """Base class of layers that replace a linear layer. Scales are stored as bytes, because `model.to(bfloat16)` would
    round them as float32."""

    kind: str
    """name of the quantizer"""
    double = False
    """whether the scales are quantized, too"""
    in_files = False
    """whether the model's own files hold it quantized"""

    def __init__(self, base: nn.Linear) -> None:
        """Take over shape, bias and class of `base`."""
        super().__init__()
        self.in_features, self.out_features, self.origin = base.in_features, base.out_features, type(base)
        self.bias = base.bias

    @classmethod
    def of_buffers(cls, base: nn.Linear, buffers: dict[str, torch.Tensor]) -> QuantizedLinear:
        """Return a layer in the place of `base` that has these buffers already."""
        layer = cls.__new__(cls)
        QuantizedLinear.__init__(layer, base)
        for name, buffer in buffers.items():
            layer.register_buffer(name, buffer)
        return layer

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out, in) in `dtype`."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ (..., out) for x (..., in), in the dtype of x; its gradient is taken as that of the weight."""
        return F.linear(x, self.dequantize(x.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + bias (..., out) for x (..., in), in the dtype of x."""
        out = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dense(self, weight: torch.Tensor) -> nn.Linear:
        """Return a layer of the class that this one has replaced, with `weight` (out, in) and the same bias."""
        # on "meta", so that no weight is allocated only to be replaced
        layer = self.origin(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """The product x Wᵀ, which saves only the layer for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer  # not its dense weight, which autograd would keep
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None  # (..., out) @ (out, in)

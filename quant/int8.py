"""Layers with int8 weights."""

from __future__ import annotations

import torch
from torch import nn

from quant.linear import QuantizedLinear


class Int8Linear(QuantizedLinear):
    """Weights in int8, with one float32 scale for each output row, whose largest magnitude becomes 127."""

    kind = "int8"

    def __init__(self, base: nn.Linear) -> None:
        """Quantize the weight (out, in) of `base`."""
        super().__init__(base)
        weight = base.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127  # (out, 1)
        scale[scale == 0] = 1.0  # rows of zeros stay zero
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale.view(torch.uint8))  # (out, 4): bytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out, in) in `dtype`, computed in float32."""
        return (self.codes * self.scale.view(torch.float32)).to(dtype)

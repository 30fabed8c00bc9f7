"""Layers with int8 weights."""

from __future__ import annotations

import torch
from torch import nn

from quant.grid import Quantized, group_index
from quant.linear import QuantizedLinear


class Int8Linear(QuantizedLinear):
    """Weights in int8, with one float32 scale for each output row, whose largest magnitude becomes 127."""

    kind = "int8"

    def __init__(self, base: nn.Linear) -> None:
        """Quantize the weight (out, in) of `base`."""
        super().__init__(base)
        codes, scale = round_rows(base.weight.detach().float())
        self.register_buffer("codes", codes)  # (out, in)
        self.register_buffer("scale", scale.view(torch.uint8))  # (out, 4): bytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out, in) in `dtype`, computed in float32."""
        return (self.codes * self.scale.view(torch.float32)).to(dtype)


def round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (out, in) int8, -127 to 127, and the scale of each row (out, 1) of a weight (out, in)."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale[scale == 0] = 1.0  # rows of zeros stay zero
    return (weight / scale).round().to(torch.int8), scale


def solve_rows(weight: torch.Tensor) -> Quantized:
    """Return a weight (out, in) rounded by `round_rows`, as codes 1 to 255 around a zero point of 128."""
    codes, scale = round_rows(weight)
    codes = (codes.to(torch.int16) + 128).to(torch.uint8)
    return Quantized(codes, scale, torch.full_like(codes[:, :1], 128), group_index(weight.shape[1], -1, weight.device))

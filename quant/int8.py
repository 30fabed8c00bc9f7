"""Layers with int8 weights, and with int8 inputs, too."""

from __future__ import annotations

import torch
from torch import nn

from quant.grid import Quantized, group_index
from quant.linear import QuantizedLinear

EXACT = 1024  # inputs whose products of two bytes still have an exact sum in float32: 1024 * 128 * 127 < 2^24


class Int8Linear(QuantizedLinear):
    """Weights in int8, with one float32 scale for each output row, whose largest magnitude becomes 127."""

    kind = "int8"

    def __init__(self, base: nn.Linear, coded: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Take codes (out, in) and scales (out, 1), or quantize the weight of `base`."""
        super().__init__(base)
        codes, scale = coded or round_rows(base.weight.detach().float())
        self.register_buffer("codes", codes)  # (out, in)
        self.register_buffer("scale", scale.float().contiguous().view(torch.uint8))  # (out, 4): bytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out, in) in `dtype`, computed in float32."""
        return (self.codes * self.scale.view(torch.float32)).to(dtype)


class W8A8Linear(Int8Linear):
    """Int8 weights, and inputs that are rounded to 8 bits with a scale for each token: 2/255 of its largest magnitude,
    as compressed-tensors has it. The product is one of whole numbers."""

    kind = "w8a8"

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ (..., out) for x (..., in)."""
        codes, scale = round_inputs(x.reshape(-1, self.in_features))
        out = whole_product(codes, self.codes) * (scale * self.scale.view(torch.float32).T)  # (n, out)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def round_inputs(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (n, in) int8 and the scale of each token (n, 1), float32 or wider, of inputs (n, in)."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale = rows.abs().amax(1, keepdim=True) / 127.5
    scale = scale.where(scale > 0, 1.0)
    return (rows / scale).round().clamp(-128, 127).to(torch.int8), scale


def round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (out, in) int8, -127 to 127, and the scale of each row (out, 1) of a weight (out, in)."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale[scale == 0] = 1.0  # rows of zeros stay zero
    return (weight / scale).round().to(torch.int8), scale


def solve_rows(weight: torch.Tensor) -> Quantized:
    """Return a weight (out, in) rounded by `round_rows`, as codes 1 to 255 around a zero point of 128."""
    return around_128(*round_rows(weight))


def around_128(codes: torch.Tensor, scale: torch.Tensor) -> Quantized:
    """Return int8 codes (out, in) with a scale for each row (out, 1) as codes around a zero point of 128."""
    codes = (codes.to(torch.int16) + 128).to(torch.uint8)
    return Quantized(codes, scale, torch.full_like(codes[:, :1], 128), group_index(codes.shape[1], -1, codes.device))


def whole_product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return codes (n, in) times weight (out, in), both int8, as (n, out) int32, exactly.

    Processors with AVX-512 multiply bytes; others are faster in float32, whose sums are exact for EXACT inputs.
    """
    if codes.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return torch._int_mm(codes, weight.T)
    total = torch.zeros(len(codes), len(weight), dtype=torch.int32, device=codes.device)
    for start in range(0, codes.shape[1], EXACT):
        part = slice(start, start + EXACT)
        total += (codes[:, part].float() @ weight[:, part].float().T).to(torch.int32)
    return total

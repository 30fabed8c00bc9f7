"""A linear layer whose weights are codes of 2, 3, 4 or 8 bits with a scale and a zero point a group of inputs."""

from __future__ import annotations

import torch
from torch import nn

from quant.grid import Quantized
from quant.linear import QuantizedLinear
from quant.packing import pack, unpack


class GroupedLinear(QuantizedLinear):
    """Codes packed along the inputs; scales in float32, kept as bytes, which `model.to(bfloat16)` leaves as they are.

    packed (out, ceil(in * bits / 32)) int32; scale (out, groups * 4) uint8; zero (out, groups) uint8;
    group (in,) int32: the group of each input.
    """

    kind = "grouped"
    bits: int

    def __init__(self, base: nn.Linear, quantized: Quantized, bits: int) -> None:
        super().__init__(base)
        self.bits = bits
        self.register_buffer("packed", pack(quantized.codes, bits))
        self.register_buffer("scale", as_bytes(quantized.scales.float()))
        self.register_buffer("zero", quantized.zeros.contiguous())
        self.register_buffer("group", quantized.groups.to(torch.int32))

    def quantized(self) -> Quantized:
        """Return codes, scales, zero points and groups, unpacked."""
        codes = unpack(self.packed, self.bits, self.in_features)  # (out, in)
        return Quantized(codes, self.scale.view(torch.float32), self.zero, self.group.long())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out, in)."""
        return self.quantized().dequantize().to(dtype)

    def group_size(self, multiple: int) -> int | None:
        """Return the number of inputs of a group, where it is a multiple of `multiple` and groups are of neighbours; a
        single group is rounded up. None where it cannot be so."""
        size = int((self.group == 0).sum())
        if self.zero.shape[1] == 1:
            size += -size % multiple
        inputs = torch.arange(self.in_features, dtype=torch.int32, device=self.group.device)
        return size if size and size % multiple == 0 and torch.equal(self.group, inputs // size) else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, groups={self.zero.shape[1]}"


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """Return values (rows, n) float32 as bytes (rows, 4 n), which `Module.to(dtype)` does not convert."""
    flat = values.flatten()  # a copy in row order: `contiguous` keeps the strides of a dimension of size 1
    return flat.view(torch.uint8).view(len(values), -1)

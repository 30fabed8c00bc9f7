"""BitNet: linear layers that are trained with weights of one or two bits and inputs of eight.

b158 (Ma et al. 2024, arXiv:2402.17764): weights are -1, 0 or 1 times their mean magnitude. b1 (Wang et al. 2023,
arXiv:2310.11453): -1 or 1, by the side of the mean that a weight lies on, times the same. Inputs are rounded with a
scale for each token. The optimizer sees full weights; gradients go through both roundings unchanged (straight-through).
The arithmetic is that of transformers.integrations.bitnet. `BitLinear` is such a layer in training, `PackedBitLinear`
the same layer afterwards, which keeps nothing but codes; both give the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from quant.linear import QuantizedLinear
from quant.packing import pack, unpack
from quant.trained import RoundedLinear, Straight


class BitLinear(RoundedLinear):
    """A linear layer in training; its weight (out, in) is the full one, its kind b158 or b1."""

    @property
    def bits(self) -> int:
        """Width of a packed weight."""
        return {"b158": 2, "b1": 1}[self.kind]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out) for x (..., in), in the dtype of x."""
        codes, scale = round_weight(self.weight.detach(), self.kind)
        weight = Straight.apply(self.weight, (codes / scale).to(self.weight.dtype)).to(x.dtype)
        out = F.linear(Straight.apply(x, round_inputs(x.detach())), weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)  # added as PackedBitLinear adds it


class PackedBitLinear(QuantizedLinear):
    """The layer after training. packed: b158: (ceil(out / 4), in) uint8, as transformers packs it: row i + k ceil(out /
    4) in the bits 2 k of row i, plus 1; b1: (out, ceil(in / 32)) int32, from the lowest bit on. scale (4,) uint8: the
    bytes of a float32, by which codes are divided."""

    def __init__(
        self, base: nn.Linear, kind: str = "b158", coded: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        """Take packed codes and their scale (1,), or those of the weight of `base`."""
        super().__init__(base)
        self.kind, self.bits = kind, {"b158": 2, "b1": 1}[kind]
        if coded is None:
            codes, scale = round_weight(base.weight.detach(), kind)
            coded = pack_ternary(codes) if kind == "b158" else pack(codes > 0, 1), scale
        self.register_buffer("packed", coded[0])
        self.register_buffer("scale", coded[1].float().reshape(1).clone().view(torch.uint8))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out, in)."""
        if self.kind == "b158":
            codes = unpack_ternary(self.packed, self.out_features)
        else:
            codes = 2 * unpack(self.packed, 1, self.in_features).to(torch.int8) - 1
        return (codes / self.scale.view(torch.float32)).to(dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ (..., out) for x (..., in)."""
        return F.linear(round_inputs(x), self.dequantize(x.dtype))


def round_weight(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (out, in) of -1, 0 and 1 as floating-point numbers, and the scale () by which they are divided."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = 1.0 / weight.abs().mean().clamp(min=1e-5)
    if kind == "b158":
        return (weight * scale).round().clamp(-1, 1), scale
    return torch.where(weight >= weight.mean(), 1.0, -1.0).to(weight.dtype), scale


def round_inputs(x: torch.Tensor) -> torch.Tensor:
    """Return x (..., in) rounded to 8 bits, in its dtype; 127 is the largest magnitude of each token."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = 127 / wide.abs().amax(-1, keepdim=True).clamp(min=1e-5)  # (..., 1)
    return ((wide * scale).round().clamp(-128, 127) / scale).to(x.dtype)


def pack_ternary(codes: torch.Tensor) -> torch.Tensor:
    """Return codes -1, 0, 1 (out, in) as (ceil(out / 4), in) uint8."""
    codes = F.pad((codes + 1).to(torch.uint8), (0, 0, 0, -len(codes) % 4))
    quarters = codes.view(4, -1, codes.shape[1])  # rows k out / 4 and so on
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack_ternary(packed: torch.Tensor, n_outputs: int) -> torch.Tensor:
    """Return codes -1, 0, 1 (out, in) int8."""
    codes = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return codes[:n_outputs].to(torch.int8) - 1

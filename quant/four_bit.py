"""NF4 and FP4 layers, coded by bitsandbytes."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from quant.linear import QuantizedLinear

BLOCK, SCALES_BLOCK = 64, 256  # number of weights that share a scale; number of scales that share one
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # numbers of weights that share a scale in files of bitsandbytes


class FourBitLinear(QuantizedLinear):
    """NF4 or FP4 weights, packed like bitsandbytes: the first value of a pair in the high half of a byte."""

    def __init__(
        self,
        base: nn.Linear,
        kind: Literal["nf4", "fp4"],
        double: bool = True,
        coded: tuple[torch.Tensor, Any] | None = None,
    ) -> None:
        """Quantize the weight (out, in) of `base`; double: its scales, too. coded: what bitsandbytes has made of it
        already, the packed codes (out * in / 2, 1) and their QuantState."""
        super().__init__(base)
        packed, state = coded or functional().quantize_4bit(
            base.weight.detach().float(), blocksize=BLOCK, quant_type=kind, compress_statistics=double
        )
        self.kind, self.double, self.block = kind, double, state.blocksize
        self.register_buffer("packed", packed)  # (out * in / 2, 1) uint8
        self.register_buffer("absmax", state.absmax.view(torch.uint8))  # one scale a block, 1 or 4 bytes each
        if double:
            # the scales less their mean, in 8 bits; one float32 scale for each block of 256 of them
            self.register_buffer("nested_absmax", state.state2.absmax.view(torch.uint8))
            self.register_buffer("offset", state.offset.reshape(1).view(torch.uint8))  # mean of the scales

    def state(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Any:
        """Return bitsandbytes' QuantState of a weight of this shape."""
        bnb, nested, offset = functional(), None, None
        absmax = self.absmax if self.double else self.absmax.view(torch.float32)
        if self.double:
            nested_absmax, offset = self.nested_absmax.view(torch.float32), self.offset.view(torch.float32)[0]
            code = scale_levels(absmax.device)
            nested = bnb.QuantState(nested_absmax, code=code, blocksize=SCALES_BLOCK, dtype=torch.float32)
        levels = bnb.get_4bit_type(self.kind, device=absmax.device)
        kind = {"quant_type": self.kind, "blocksize": self.block, "dtype": dtype, "code": levels}
        return bnb.QuantState(absmax, shape=shape, offset=offset, state2=nested, **kind)

    def scales(self) -> torch.Tensor:
        """Return the scale of each block, (out * in / 64,) float32."""
        if not self.double:
            return self.absmax.view(torch.float32)
        state = self.state(torch.Size((1, 2 * self.packed.numel())))
        return functional().dequantize_blockwise(state.absmax, state.state2).float() + state.offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out, in) in `dtype`, computed in float32."""
        # as one row: bitsandbytes' CPU kernel would begin a new block with every row of a matrix, unlike its quantizer
        state = self.state(torch.Size((1, 2 * self.packed.numel())))
        row = functional().dequantize_4bit(self.packed, state).flatten()  # (out * in,), and one more when that is odd
        return row[: self.out_features * self.in_features].view(self.out_features, self.in_features).to(dtype)


def functional() -> Any:
    """Return `bitsandbytes.functional`, without the warning about an optional kernel that it would fetch from a hub."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


def levels_of(kind: str) -> torch.Tensor:
    """Return the 16 levels of nf4 or fp4, (16,) float32."""
    return functional().get_4bit_type(kind, device="cpu").float()


def scale_levels(device: torch.device) -> torch.Tensor:
    """Return the 256 levels of a scale in double quantization, dense near zero (Dettmers 2015, arXiv:1511.04561)."""
    if device not in _levels:
        _levels[device] = functional().create_dynamic_map().to(device)
    return _levels[device]


_levels: dict[torch.device, torch.Tensor] = {}

"""Quantization-aware training: linear layers that learn with weights on the grids of quantize.py.

A row of a weight is cut into groups of inputs; each has a scale and a zero point, found anew from the full weights in
every forward pass (the whole range of the group). What training ends with is packed without any change of a number:
scales are rounded to float16, and zero points are 1 or more, so that every format can hold them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quant.grid import GridOptions, Quantized, find_grid, group_index, round_to_grid
from quant.trained import RoundedLinear, Straight

KIND = re.compile(r"int([2348])g(-1|[1-9]\d*)")
LEAST_SCALE = 2.0**-14  # the smallest float16 that keeps all of its digits
METHOD = "fake_quantized"  # quant_method in config.json: other programs compute with the full weights


class QATLinear(RoundedLinear):
    """A linear layer in training, whose weight is rounded in every forward pass."""

    @property
    def grid(self) -> GridOptions:
        """Widths and groups."""
        return grid_of(self.kind)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.grid.bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out) for x (..., in), in the dtype of x."""
        rounded = solve(self.weight.detach(), self.grid).dequantize().to(self.weight.dtype)
        out = F.linear(x, Straight.apply(self.weight, rounded).to(x.dtype))
        return out if self.bias is None else out + self.bias.to(out.dtype)


def kind_of(bits: int, group_size: int) -> str:
    """Return the name of a grid, such as int4g128; group_size -1: whole rows."""
    return f"int{bits}g{group_size}"


def grid_of(kind: str) -> GridOptions:
    """Return the grid of a name; raises ValueError for one that is none."""
    if (match := KIND.fullmatch(kind)) is None:
        raise ValueError(f"expected the name of a grid such as int4g128, found {kind!r:.50}")
    return GridOptions(int(match[1]), int(match[2]), search=False, least_zero=1)


def solve(weight: torch.Tensor, grid: GridOptions) -> Quantized:
    """Return a weight (out, in) on the grids of its groups, in float32 or wider."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    n_outputs, n_inputs = weight.shape
    size = min(grid.group_size, n_inputs) if grid.group_size > 0 else n_inputs
    groups = group_index(n_inputs, size, weight.device)
    # zeros at the end of the last group change no range: every range holds 0
    padded = F.pad(weight, (0, -n_inputs % size)).reshape(-1, size)  # (out * groups, size)
    scale, zero = find_grid(padded, grid)
    scale = scale.clamp(LEAST_SCALE, torch.finfo(torch.float16).max).to(torch.float16).to(weight.dtype)
    codes = round_to_grid(padded, scale, zero, grid).reshape(n_outputs, -1)[:, :n_inputs]
    scale, zero = scale.reshape(n_outputs, -1), zero.reshape(n_outputs, -1)
    return Quantized(codes.to(torch.uint8), scale, zero.to(torch.uint8), groups)


def config_of(kind: str) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint with full weights, which are rounded as they are used."""
    grid = grid_of(kind)
    return {
        "quant_method": METHOD,
        "quantization_mode": "online",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "modules_to_not_convert": ["lm_head"],
    }


def kind_of_config(settings: dict[str, Any]) -> str:
    """Return the kind that `config_of` wrote; raises ValueError for settings that no grid has."""
    try:
        return kind_of(grid_of(f"int{settings.get('bits')}g{settings.get('group_size')}").bits, settings["group_size"])
    except ValueError:
        raise ValueError(
            "config.json: weights that are rounded as they are used need bits of 2, 3, 4 or 8 and a group_size of -1 "
            f"or more than 0, found {settings.get('bits')!r:.20} and {settings.get('group_size')!r:.20}"
        ) from None


def nearest_grid(layer: nn.Linear) -> Quantized:
    """Return the weight of a layer as it was trained: what quantize.py --method qat packs."""
    return solve(layer.weight.detach(), layer.grid)

"""The grid that weights are rounded to: b-bit codes, with a scale and a zero point for each group of inputs of a row.

    weight ~ scale * (code - zero),   0 <= code <= 2^b - 1

A row of a weight (out, in) is cut into groups of `group_size` neighbouring inputs; the last group of a row may be
shorter. Every grid holds 0 exactly, so that padding and pruned weights stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

SHRINKS = 80  # ranges tried by the search: 1, 0.99, .., 0.21 of the full one (AutoGPTQ's)
EXPONENT = 2.4  # of the error that the search minimises (AutoGPTQ's norm)


@dataclass(frozen=True)
class GridOptions:
    """How fine the grid of a weight is, and how its range is found."""

    bits: int = 4
    """width of a code: 2, 3, 4 or 8"""
    group_size: int = 128
    """inputs that share a scale; -1: the whole row"""
    symmetric: bool = False
    """put the zero point in the middle of the codes; False: where the range asks for it"""
    search: bool = True
    """narrow the range where that lowers the error of rounding; False: from the least to the largest weight"""
    least_zero: int = 0
    """smallest zero point of an asymmetric grid: 1 for files of GPTQ version 1, which store zero - 1"""

    def __post_init__(self) -> None:
        """Raise ValueError for a width or a group that no grid has."""
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits should be 2, 3, 4 or 8, found {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size should be -1 (the whole row) or at least 1, found {self.group_size}")

    @property
    def largest(self) -> int:
        """Largest code."""
        return 2**self.bits - 1


class Quantized(NamedTuple):
    """A quantized weight: what solvers return, and what packing and layers take."""

    codes: torch.Tensor
    """(out, in) uint8"""
    scales: torch.Tensor
    """(out, groups) in the dtype of the arithmetic"""
    zeros: torch.Tensor
    """(out, groups) uint8"""
    groups: torch.Tensor
    """(in,) int64: the group of each input"""

    def dequantize(self) -> torch.Tensor:
        """Return the weight (out, in) that the codes stand for."""
        zeros = self.zeros[:, self.groups].to(self.scales.dtype)  # (out, in)
        return self.scales[:, self.groups] * (self.codes.to(self.scales.dtype) - zeros)


def group_index(n_inputs: int, group_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the group of each input, (in,) int64."""
    index = torch.arange(n_inputs, device=device)
    return index // group_size if group_size > 0 else torch.zeros_like(index)


def find_grid(weight: torch.Tensor, options: GridOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point of each row, (out, 1) both in the dtype of `weight` (out, n): one group's inputs.

    The zero point is a whole number. A row of zeros gets the range from -1 to 1.
    """
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale, zero = _grid_of_range(low, high, options)
    if not options.search:
        return scale, zero
    least = _error(weight, scale, zero, options)  # (out, 1)
    for step in range(1, SHRINKS):
        share = 1 - step / 100
        narrow = _grid_of_range(share * low, share * high, options)
        error = _error(weight, *narrow, options)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, narrow[0], scale), torch.where(better, narrow[1], zero)
    return scale, zero


def find_grids(weight: torch.Tensor, options: GridOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and zero points of all groups of a weight (out, in): (out, groups) both."""
    size = options.group_size if options.group_size > 0 else weight.shape[1]
    grids = [find_grid(part, options) for part in weight.split(size, dim=1)]
    scales, zeros = zip(*grids)
    return torch.cat(scales, dim=1), torch.cat(zeros, dim=1)


def round_to_grid(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, options: GridOptions) -> torch.Tensor:
    """Return the nearest codes, in the dtype of `weight`; all arguments broadcast to (out, n)."""
    return (torch.round(weight / scale) + zero).clamp(0, options.largest)


def _grid_of_range(low: torch.Tensor, high: torch.Tensor, options: GridOptions) -> tuple[torch.Tensor, torch.Tensor]:
    if options.symmetric:
        # The range is widened to both sides: where all weights of a group have one sign, half of the codes are unused,
        # but no weight is clipped.
        scale = 2 * torch.maximum(-low, high) / options.largest
        return scale, torch.full_like(scale, (options.largest + 1) // 2)
    scale = (high - low) / options.largest
    return scale, torch.round(-low / scale).clamp(options.least_zero, options.largest)


def _error(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, options: GridOptions) -> torch.Tensor:
    """Return the error of each row, (out, 1): sum of |rounded - weight|^2.4."""
    rounded = scale * (round_to_grid(weight, scale, zero, options) - zero)
    return (rounded - weight).abs().pow(EXPONENT).sum(1, keepdim=True)

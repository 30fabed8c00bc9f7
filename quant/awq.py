"""AWQ (Lin et al. 2023, arXiv:2306.00978): make the channels that carry large activations easier to round.

Multiplying column j of a weight by s_j and dividing channel j of its input by s_j changes nothing; rounding the weight
in between is more exact in the columns that were enlarged. s = x^a / sqrt(max x^a * min x^a), x_j the mean of |x_j|,
and a from 0 (nothing changes) to 0.95 by the output error that rounding leaves. The division is folded into what
makes the input: a norm, or the linear layer before. Afterwards the range of every group is narrowed where that lowers
the output error (clipping).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quant.grid import GridOptions, Quantized, find_grid, find_grids, group_index, round_to_grid

STEPS = 20  # exponents tried: 0, 0.05, .., 0.95
CLIPS = 10  # shares of the range tried: 1, 0.95, .., 0.55


@dataclass(frozen=True)
class Fold:
    """A place where a scale can be put: channel j of what `before` makes is channel j of what `after` take."""

    before: nn.Module
    """a norm or a linear layer: its weight's first dimension is divided"""
    after: Sequence[nn.Linear]
    """their weights' columns are multiplied"""
    repeats: int = 1
    """query heads to a key/value head, where `before` is v_proj and `after` o_proj"""
    head_dim: int = 1
    """dimension of a head, likewise"""


@torch.no_grad()
def search_scale(
    fold: Fold, x: torch.Tensor, run: Callable[[], torch.Tensor], options: GridOptions
) -> tuple[torch.Tensor, float]:
    """Return the scale (channels of `before`) with the least output error, and its exponent.

    x (..., in): inputs of the layers `after`. run() gives the output of the module around them with their weights as
    they stand. The weights are as before afterwards. Raises ValueError where no error is finite.
    """
    magnitude = to_channels(x.reshape(-1, x.shape[-1]).abs().float().mean(0), fold)  # (channels,)
    weights = [layer.weight.detach().clone() for layer in fold.after]
    wanted = run()  # output with the weights unrounded
    best: tuple[float, torch.Tensor, float] | None = None
    for step in range(STEPS):
        exponent = step / STEPS
        scale = magnitude.clamp(min=1e-8).pow(exponent).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()  # (channels,), around 1
        wide = to_inputs(scale, fold)  # (in,)
        for layer, weight in zip(fold.after, weights):
            # The layer gets the weight that it would compute with, its input not being divided: Q(W s) / s.
            layer.weight.copy_(rounded(weight.float() * wide, options) / wide)
        error = float((run() - wanted).float().square().mean())
        if best is None or error < best[0]:
            best = (error, scale, exponent)
    for layer, weight in zip(fold.after, weights):
        layer.weight.copy_(weight)
    if best is None or not torch.isfinite(torch.tensor(best[0])):
        raise ValueError(
            "the error of AWQ's scales is not finite on the calibration text: the activations overflow, or the model "
            "has diverged"
        )
    return best[1], best[2]


@torch.no_grad()
def apply_scale(fold: Fold, scale: torch.Tensor) -> None:
    """Divide what makes the inputs by `scale` (channels,), and multiply the weights that take them: nothing changes."""
    before = fold.before
    shape = (-1, *[1] * (before.weight.dim() - 1))  # (channels,) of a norm, (channels, 1) of a linear layer
    before.weight.div_(scale.to(before.weight).view(shape))
    if getattr(before, "bias", None) is not None:
        before.bias.div_(scale.to(before.bias))
    wide = to_inputs(scale, fold)
    for layer in fold.after:
        layer.weight.mul_(wide.to(layer.weight))


def to_inputs(scale: torch.Tensor, fold: Fold) -> torch.Tensor:
    """Return the scale of each input (in,) of the layers `after`: query heads that share a key/value head share it."""
    if fold.repeats == 1:
        return scale
    return scale.view(-1, 1, fold.head_dim).expand(-1, fold.repeats, -1).reshape(-1)  # (K, H/K, D) -> (in,)


def to_channels(magnitude: torch.Tensor, fold: Fold) -> torch.Tensor:
    """Return the magnitude of each channel of `fold.before`: the mean over the inputs of `after` that it feeds."""
    if fold.repeats == 1:
        return magnitude
    return magnitude.view(-1, fold.repeats, fold.head_dim).mean(1).reshape(-1)  # (K, H/K, D) -> (channels,)


def rounded(weight: torch.Tensor, options: GridOptions) -> torch.Tensor:
    """Return a weight (out, in) rounded to its grid."""
    groups = group_index(weight.shape[1], options.group_size, weight.device)
    scales, zeros = find_grids(weight, options)  # (out, groups) each
    scale, zero = scales[:, groups], zeros[:, groups]  # (out, in): each weight with the grid of its group
    return scale * (round_to_grid(weight, scale, zero, options) - zero)


@torch.no_grad()
def solve_clipped(weight: torch.Tensor, gram: torch.Tensor, options: GridOptions) -> Quantized:
    """Return the weight (out, in) rounded to grids whose ranges leave the least output error on the inputs x of the
    calibration text.

    gram (in, in): sum of x xᵀ, times any factor. Groups are compared one by one: the error of a group's share of the
    output.
    """
    weight, gram = weight.float(), gram.float()
    size = options.group_size if options.group_size > 0 else weight.shape[1]
    scales, zeros = [], []
    for start, part in zip(range(0, weight.shape[1], size), weight.split(size, dim=1)):  # (out, g)
        inputs = slice(start, start + part.shape[1])
        scale, zero = clipped_grid(part, gram[inputs, inputs], options)
        scales.append(scale)
        zeros.append(zero)
    all_scales, all_zeros = torch.cat(scales, dim=1), torch.cat(zeros, dim=1)  # (out, groups) each
    groups = group_index(weight.shape[1], options.group_size, weight.device)
    codes = round_to_grid(weight, all_scales[:, groups], all_zeros[:, groups], options)
    return Quantized(codes.to(torch.uint8), all_scales, all_zeros.to(torch.uint8), groups)


def clipped_grid(weight: torch.Tensor, gram: torch.Tensor, options: GridOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point (out, 1) of one group: weight (out, g), second moments of its inputs (g, g)."""
    scale, zero = find_grid(weight, options)
    least = output_error(weight, scale, zero, gram, options)
    largest = weight.abs().amax(1, keepdim=True)  # (out, 1)
    for step in range(1, CLIPS):
        share = 1 - step / (2 * CLIPS)
        # Either the larger side of the range is cut first, or both sides are cut by the same share.
        for narrowed in (weight.clamp(-share * largest, share * largest), share * weight):
            narrow = find_grid(narrowed, options)
            error = output_error(weight, *narrow, gram, options)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, narrow[0], scale), torch.where(better, narrow[1], zero)
    return scale, zero


def output_error(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, gram: torch.Tensor, options: GridOptions
) -> torch.Tensor:
    """Return the squared error (out, 1) of the outputs of weights (out, g) when they are rounded to a grid."""
    miss = scale * (round_to_grid(weight, scale, zero, options) - zero) - weight  # (out, g)
    return ((miss @ gram) * miss).sum(1, keepdim=True)  # sum over inputs of (x · miss)², without (n, out)

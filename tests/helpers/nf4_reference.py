"""4-bit quantization as QLoRA (Dettmers et al. 2023, arXiv:2305.14314) says it, nothing packed away: the oracle.

A tensor is a row of blocks of 64 values. Each is divided by its largest magnitude and every value replaced by the
nearest of 16 levels. Double quantization treats these magnitudes, less their mean, as a tensor of their own: blocks of
256, 256 levels.
"""

from __future__ import annotations

import torch

# nf4: quantiles of a normal distribution, with an exact zero, scaled to [-1, 1] (appendix E)
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
# fp4: a sign, two bits of exponent, one of mantissa; the code is the pattern of bits
FP4 = [sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
LEVELS = {"nf4": torch.tensor(NF4), "fp4": torch.tensor(FP4)}


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The code of the level nearest to each value; halfway, of the lower one."""
    order = levels.argsort(stable=True)
    ladder = levels[order]
    return order[torch.searchsorted((ladder[1:] + ladder[:-1]) / 2, values)]


def blockwise(values: torch.Tensor, levels: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n,) and the largest magnitude of each block."""
    blocks = values.flatten().split(size)
    scales = torch.stack([block.abs().max() for block in blocks])
    codes = [nearest(block * (1 / scale) if scale else block, levels) for block, scale in zip(blocks, scales)]
    return torch.cat(codes), scales


def undo(codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, size: int) -> torch.Tensor:
    """The values (n,) that codes and scales stand for."""
    return torch.cat([levels[block] * scale for block, scale in zip(codes.split(size), scales)])


def dynamic_levels() -> torch.Tensor:
    """The 256 levels of a scale: per power of ten from 1e-6 to 1, twice as many fractions as in the one below
    (Dettmers 2015, arXiv:1511.04561), either sign, and 0 and 1."""
    levels = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        for fraction in ((edges[:-1] + edges[1:]) / 2 * 10 ** (power - 6)).tolist():
            levels += [fraction, -fraction]
    return torch.tensor(sorted(levels))


def packed(codes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the high half; an odd one is followed by that of zero."""
    pairs = torch.cat([codes, nearest(torch.zeros(len(codes) % 2), levels)]).view(-1, 2)
    return (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)

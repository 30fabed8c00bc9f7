"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): make inputs with outliers fit into 8 bits.

Channel j of an input is divided by s_j, and column j of the weight multiplied: nothing changes, but the outliers have
moved into the weight, which has a finer scale. s_j = max |x_j|^a / max |w_j|^(1 - a), with a share a of the difficulty.
The division is folded into what makes the input, as in awq.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from quant.awq import Fold, to_inputs
from quant.int8 import W8A8Linear

ALPHAS = tuple(step / 20 for step in range(4, 20))  # 0.2 to 0.95


@torch.no_grad()
def search_scale(
    fold: Fold, x: torch.Tensor, run: Callable[[], torch.Tensor], alpha: float | None = None
) -> tuple[torch.Tensor, float | None]:
    """Return the scale (channels of `fold.before`) of the share `alpha`, and alpha. None: the one with the least output
    error, or no scale, with None, where that is least.

    x (..., in): inputs of the layers `fold.after`. run() gives the output of the module around them. Raises ValueError
    where no error is finite.
    """
    magnitude = x.reshape(-1, x.shape[-1]).abs().amax(0)  # (in,)
    largest = torch.stack([layer.weight.detach().abs().amax(0) for layer in fold.after]).amax(0)  # (in,)
    if alpha is not None:
        return smoothing(fold, magnitude, largest, alpha), alpha
    wanted, best = run(), None
    for share in (None, *ALPHAS):
        scale = torch.ones_like(largest) if share is None else smoothing(fold, magnitude, largest, share)
        if share is None and fold.repeats > 1:
            scale = scale[: len(scale) // fold.repeats]
        error = float((rounded_run(fold, scale, run) - wanted).float().square().mean())
        if best is None or error < best[0]:
            best = (error, scale, share)
    if not torch.isfinite(torch.tensor(best[0])):
        raise ValueError(
            "the error of SmoothQuant's scales is not finite on the calibration text: the activations overflow, or the "
            "model has diverged"
        )
    return best[1], best[2]


def smoothing(fold: Fold, magnitude: torch.Tensor, largest: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the scale (channels of `fold.before`) of largest inputs and weights (in,) of each channel; 1 where either
    is 0."""
    if fold.repeats > 1:  # query heads that share a key/value head share a scale
        magnitude, largest = (t.view(-1, fold.repeats, fold.head_dim).amax(1).flatten() for t in (magnitude, largest))
    scale = magnitude.pow(alpha) / largest.pow(1 - alpha)
    return torch.where((magnitude > 0) & (largest > 0), scale, 1.0).clamp(1e-4, 1e4)


def rounded_run(fold: Fold, scale: torch.Tensor, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return run() with the layers `fold.after` in 8 bits, their inputs divided by the scale."""
    wide = to_inputs(scale, fold).to(fold.after[0].weight)
    try:
        for layer in fold.after:
            smooth = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            smooth.weight, smooth.bias = nn.Parameter(layer.weight * wide), layer.bias
            quantized = W8A8Linear(smooth)
            layer.forward = lambda x, quantized=quantized: quantized(x / wide)  # in front of the class's own
        return run()
    finally:
        for layer in fold.after:
            layer.__dict__.pop("forward", None)

"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-split layout of Hugging Face's LLaMA.

Dimension i of a head is paired with dimension i + D/2, and the pair turns by `position * theta^(-2i/D)`. Meta's
checkpoints pair neighbours (2i, 2i+1) instead; the two differ by a permutation of the rows of W_q and W_k.

Nothing here is a buffer of the model: `model.bfloat16()` would round a stored frequency and turn positions in the
thousands by whole radians. Angles are made in float32 from Python floats, at every call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# name in config.json -> function(head_dim, theta, scaling) -> (inverse frequencies of length D/2, attention factor)
SCALINGS: dict[str, Callable[[int, float, dict], tuple[list[float], float]]] = {}


def register(name: str) -> Callable:
    """Decorator: make a frequency function known under the `rope_type` that `config.json` uses."""

    def add(function: Callable) -> Callable:
        SCALINGS[name] = function
        return function

    return add


@register("default")
def plain(head_dim: int, theta: float, scaling: dict) -> tuple[list[float], float]:
    """The unscaled encoding: theta^(-2i/D) for i < D/2."""
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], 1.0


def frequencies(head_dim: int, theta: float, scaling: dict | None) -> tuple[list[float], float]:
    """Inverse frequencies (D/2 floats) and the factor on cos and sin, for a `rope_scaling` entry (None: plain)."""
    name = rope_type(scaling)
    if name not in SCALINGS:
        raise ValueError(f"rope_scaling asks for type {name!r}; known types are {', '.join(sorted(SCALINGS))}")
    return SCALINGS[name](head_dim, theta, scaling or {})


def rope_type(scaling: dict | None) -> str:
    """The type named by a `rope_scaling` mapping, under its present key `rope_type` or the older `type`."""
    scaling = scaling or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def cos_sin(positions: torch.Tensor, inv_freq: list[float], factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles, float32 (..., T, D/2), for integer or fractional `positions` (..., T)."""
    frequency = torch.tensor(inv_freq, dtype=torch.float32, device=positions.device)
    angles = positions.float()[..., None] * frequency
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of `x` (B, T, H, D) by its angle, in x's dtype; cos, sin (B or 1, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D/2) each; the products are float32, whatever x is
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

"""What every encoding is made of: the registry, the parts that families share, angles, and the rotation itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Frequencies = tuple[list[float], float]  # inverse frequencies (D/2), and the factor on cos and sin


@dataclass(frozen=True)
class Rope:
    """A position encoding without parameters of its own."""

    frequencies: Callable[[int], Frequencies]
    """inverse frequencies and attention factor for a text of so many tokens; ValueError beyond `limit`"""
    cache_rotated: bool = True
    """the frequencies are the same for every length, so that keys may be cached after their rotation"""
    limit: int | None = None
    """the longest text that the encoding is made for; None: any"""

    def prepare(
        self, positions: torch.Tensor, length: int | torch.Tensor, training: bool = False
    ) -> tuple[torch.Tensor, list[float] | torch.Tensor, float | torch.Tensor]:
        """What `cos_sin` takes. positions (B or 1, T); length: of the text, one for all, or (B, 1) or (B, T) int64."""
        if self.cache_rotated or isinstance(length, int):
            return positions, *self.frequencies(0 if self.cache_rotated else length)
        return positions, *by_length(self.frequencies, length)


@dataclass(frozen=True)
class Family:
    """A type of scaling: make(head_dim, theta, scaling, max_seq_len) -> Rope, and the keys of its scaling entry."""

    make: Callable[[int, float, dict[str, Any], int], Any]
    required: frozenset[str]
    optional: frozenset[str]


FAMILIES: dict[str, Family] = {}  # by the name that config.json has for it


def register(name: str, required: Sequence[str] = (), optional: Sequence[str] = ()) -> Callable:
    """Decorator: make a family known under the `rope_type` that `config.json` uses."""

    def add(make: Callable) -> Callable:
        FAMILIES[name] = Family(make, frozenset(required), frozenset(optional))
        return make

    return add


def fixed(inv_freq: list[float], factor: float = 1.0) -> Rope:
    """An encoding whose frequencies do not depend on the length of the text."""
    return Rope(lambda length: (inv_freq, factor))


def plain(head_dim: int, theta: float) -> list[float]:
    """The unscaled inverse frequencies: theta^(-2i/D) for i < D/2."""
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def ntk_theta(head_dim: int, theta: float, alpha: float) -> float:
    """The base that divides the slowest frequency by `alpha` and leaves the fastest as it is (bloc97 2023)."""
    if head_dim < 4:
        raise ValueError(f"head_dim {head_dim} has one frequency only; changing the base needs at least 4")
    return theta * alpha ** (head_dim / (head_dim - 2))


def text_lengths(positions: torch.Tensor, doc_ids: torch.Tensor | None) -> torch.Tensor:
    """How long the text is that each token belongs to, (B, 1), or (B, T) where rows hold several documents: a change
    of id (`doc_ids` (B, T)) begins another."""
    if doc_ids is None:
        return positions.amax(1, keepdim=True) + 1
    T = doc_ids.shape[1]
    ends = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (0, 1), value=True)  # (B, T)
    place = torch.where(ends, torch.arange(T, device=ends.device), T)
    last = place.flip(1).cummin(1).values.flip(1)  # where each token's document ends
    return positions.expand(doc_ids.shape).gather(1, last) + 1


def by_length(frequencies: Callable[[int], Frequencies], lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse frequencies (..., D/2) and factors (..., 1), float64 on the CPU, for `lengths` (...) that differ."""
    distinct, which = lengths.cpu().unique(return_inverse=True)
    inv_freq, factor = zip(*(frequencies(n) for n in distinct.tolist()))
    return tuple(torch.tensor(x, dtype=torch.float64)[which] for x in (inv_freq, [[f] for f in factor]))


def cos_sin(
    positions: torch.Tensor, inv_freq: Sequence[float] | torch.Tensor, factor: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles, float32 (..., T, D/2), for integer or fractional `positions` (..., T).

    inv_freq: D/2 numbers, or a tensor that broadcasts against (..., T, D/2); factor multiplies both.
    """
    angles = positions.float()[..., None] * torch.as_tensor(inv_freq, dtype=torch.float32, device=positions.device)
    if torch.is_tensor(factor):
        factor = factor.to(angles.device, torch.float32)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of `x` (..., D) by its angle, in x's dtype; cos, sin (..., D/2) broadcast."""
    a, b = x.chunk(2, dim=-1)  # (..., D/2) each; the products are float32, whatever x is
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@register("default")
def unscaled(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """The encoding as RoFormer has it."""
    return fixed(plain(head_dim, theta))

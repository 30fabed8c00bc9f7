"""The registry of position encodings, the parts that they share, angles, and the rotation itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rope.keys import Kind

Frequencies = tuple[list[float], float]  # inverse frequencies (D/2), and the factor on cos and sin


@dataclass(frozen=True)
class Rope:
    """A position encoding without parameters."""

    frequencies: Callable[[int], Frequencies]
    """function from the length of a text in tokens to its frequencies; ValueError beyond `limit`"""
    cache_rotated: bool = True
    """whether the frequencies are the same for every length, so that a cache may hold keys after their rotation"""
    limit: int | None = None
    """length of the longest text, in tokens; None: no limit"""

    def prepare(
        self, positions: torch.Tensor, length: int | torch.Tensor, training: bool = False
    ) -> tuple[torch.Tensor, list[float] | torch.Tensor, float | torch.Tensor]:
        """Return the three arguments of `cos_sin` for `positions` (B or 1, T).

        length: of the text; one number for all rows, or int64 (B, 1) or (B, T). training is used by CLEX only.
        """
        if self.cache_rotated or isinstance(length, int):
            return positions, *self.frequencies(0 if self.cache_rotated else length)
        return positions, *by_length(self.frequencies, length)


@dataclass(frozen=True)
class Family:
    """A type of scaling."""

    make: Callable[[int, float, dict[str, Any], int], Any]
    """function of head_dim, theta, scaling entry and max_seq_len that returns a Rope"""
    required: Mapping[str, Kind]
    """keys that its entry must have"""
    optional: Mapping[str, Kind]
    """keys that its entry may have"""
    defaults: Mapping[str, Any]
    """values of required keys that `rope.extend` writes when the checkpoint has none"""
    bounded: bool
    """whether factor * window is the length of the longest text"""
    not_extendable: str
    """why `rope.extend` refuses the type; "": it does not"""


FAMILIES: dict[str, Family] = {}  # key: `rope_type` in config.json


def register(
    name: str,
    required: Mapping[str, Kind] | None = None,
    optional: Mapping[str, Kind] | None = None,
    defaults: Mapping[str, Any] | None = None,
    bounded: bool = True,
    not_extendable: str = "",
) -> Callable:
    """Return a decorator that registers a function or class as the family `name`. See `Family` for the arguments."""

    if not {"factor", "max_factor"} & (required or {}).keys():  # the two numbers that `rope.extend` can write
        not_extendable = not_extendable or "it has no factor to stretch positions by"

    def add(make: Callable) -> Callable:
        FAMILIES[name] = Family(make, required or {}, optional or {}, defaults or {}, bounded, not_extendable)
        return make

    return add


def fixed(inv_freq: list[float], factor: float = 1.0) -> Rope:
    """Return an encoding whose frequencies do not depend on the length of the text."""
    return Rope(lambda length: (inv_freq, factor))


def plain(head_dim: int, theta: float) -> list[float]:
    """Return the unscaled inverse frequencies theta^(-2i/D), i < D/2."""
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def ntk_theta(head_dim: int, theta: float, alpha: float) -> float:
    """Return the base that makes the slowest frequency `alpha` times slower and keeps the fastest (bloc97 2023).

    Raises ValueError for a head_dim below 4, which has one frequency only.
    """
    if head_dim < 4:
        raise ValueError(f"head_dim {head_dim} has one frequency only; changing the base needs at least 4")
    return theta * alpha ** (head_dim / (head_dim - 2))


def text_lengths(positions: torch.Tensor, doc_ids: torch.Tensor | None) -> torch.Tensor:
    """Return the length of the text that each token belongs to: (B, 1), or (B, T) with several documents in a row.

    positions (B or 1, T) int64, restarting in each document; doc_ids (B, T): every change of id begins a document.
    """
    if doc_ids is None:
        return positions.amax(1, keepdim=True) + 1
    T = doc_ids.shape[1]
    ends = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (0, 1), value=True)  # (B, T): last token of its document
    # index of each last token, T elsewhere; the running minimum from the right is then the end of each token's document
    place = torch.where(ends, torch.arange(T, device=ends.device), T)
    last = place.flip(1).cummin(1).values.flip(1)  # (B, T)
    return positions.expand(doc_ids.shape).gather(1, last) + 1  # (B, T): position of that end, plus one


def by_length(frequencies: Callable[[int], Frequencies], lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inverse frequencies (..., D/2) and attention factors (..., 1) of texts of the lengths (...) int64.

    frequencies(n) gives both for a text of n tokens. The results are float64, on the CPU.
    """
    # each distinct length once, n of them: tables (n, D/2) and (n, 1), indexed by `which` (...)
    distinct, which = lengths.cpu().unique(return_inverse=True)
    inv_freq, factor = zip(*(frequencies(n) for n in distinct.tolist()))
    return tuple(torch.tensor(x, dtype=torch.float64)[which] for x in (inv_freq, [[f] for f in factor]))


def cos_sin(
    positions: torch.Tensor, inv_freq: Sequence[float] | torch.Tensor, factor: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the angles, float32 (..., T, D/2), for integer or fractional `positions` (..., T).

    inv_freq: D/2 numbers, or a tensor that broadcasts against (..., T, D/2); factor multiplies both cos and sin.
    """
    # (..., T, 1) * (D/2,); float32 whatever the model is cast to
    angles = positions.float()[..., None] * torch.as_tensor(inv_freq, dtype=torch.float32, device=positions.device)
    if torch.is_tensor(factor):
        factor = factor.to(angles.device, torch.float32)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x_i, x_{i+D/2}) of `x` (..., D) by its angle, in x's dtype; cos, sin (..., D/2) broadcast."""
    a, b = x.chunk(2, dim=-1)  # (..., D/2) each; the products are float32, whatever x is
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # (..., D)


@register("default", not_extendable="it stretches nothing")
def unscaled(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """Return the encoding of RoFormer, without scaling."""
    return fixed(plain(head_dim, theta))

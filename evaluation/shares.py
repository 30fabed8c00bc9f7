"""Shares of a count, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """`count` of `of`; shares of disjoint sets can be added."""

    count: int = 0
    of: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.count + other.count, self.of + other.of)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % score interval (Wilson 1927), which holds for shares near 0 and 1, too; (0, 1) of nothing."""
        if not self.of:
            return 0.0, 1.0
        z, n, p = 1.959964, self.of, self.count / self.of
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

    def __str__(self) -> str:
        low, high = self.interval()
        share = f"{self.count / self.of:6.1%}" if self.of else "     -"
        return f"{share}  ({low:6.1%} to {high:6.1%})  {self.count} of {self.of}"


def total(scores: Iterable[Mapping[str, Share]]) -> dict[str, Share]:
    """Return the sum of the shares of each name."""
    sums: dict[str, Share] = {}
    for score in scores:
        for name, share in score.items():
            sums[name] = sums.get(name, Share()) + share
    return sums


def plain(shares: Mapping[str, Share]) -> dict[str, dict]:
    """Return shares with their intervals as they are written in JSON."""
    return {name: {**vars(share), "interval": share.interval()} for name, share in shares.items()}

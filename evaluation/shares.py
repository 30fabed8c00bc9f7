"""Shares of a count, with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """`count` of `of`."""

    count: int
    of: int

    def interval(self) -> tuple[float, float]:
        """The 95 % score interval (Wilson 1927), which holds for shares near 0 and 1, too; (0, 1) of nothing."""
        if not self.of:
            return 0.0, 1.0
        z, n, p = 1.959964, self.of, self.count / self.of
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

    def __str__(self) -> str:
        low, high = self.interval()
        share = f"{self.count / self.of:6.1%}" if self.of else "     -"
        return f"{share}  ({low:6.1%} to {high:6.1%})  {self.count} of {self.of}"

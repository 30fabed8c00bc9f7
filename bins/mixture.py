"""Weighted mixtures of sources: which source each row of a run is from, and the flag that says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Mixture:
    """Which source each row of a run is from: shares that hold at every row, and change at given steps.

    phases: (first step, share of each source), the first one from step 0. Shares of a phase are divided by their sum
        and rounded to multiples of 1 / CYCLE.
    batch_size: rows of a step.

    Of the first n rows of a phase, a source with share p has more than n p - 1 and less than n p + 1 (Tijdeman 1980):
    the j-th of its rows lies between row (j - 1) / p and row j / p, and of all that may come next the one whose last
    place is nearest comes first. After CYCLE rows the pattern repeats.
    """

    CYCLE = 10_000

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]], batch_size: int) -> None:
        self.starts = [start for start, _ in phases]
        self.batch_size = batch_size
        self._patterns = [self._pattern(shares) for _, shares in phases]
        n = len(phases[0][1])
        # (CYCLE + 1, sources) of each phase: rows of each source among the first 0, 1, ... of a cycle
        self._counts = [
            np.concatenate([np.zeros((1, n), np.int64), np.cumsum(pattern[:, None] == np.arange(n), axis=0)])
            for pattern in self._patterns
        ]

    def counts(self, step: int) -> np.ndarray:
        """Return how many rows of each source the steps before `step` have, (sources,) int64."""
        total = np.zeros(self._counts[0].shape[1], np.int64)
        for start, end, counts in zip(self.starts, [*self.starts[1:], step], self._counts):
            if start < step:
                cycles, rest = divmod((min(end, step) - start) * self.batch_size, self.CYCLE)
                total += cycles * counts[-1] + counts[rest]
        return total

    def sources(self, step: int) -> np.ndarray:
        """Return the source of each row of `step`, (batch_size,) int64."""
        phase = max(i for i, start in enumerate(self.starts) if start <= step)
        rows = (step - self.starts[phase]) * self.batch_size + np.arange(self.batch_size)
        return self._patterns[phase][rows % self.CYCLE]

    def _pattern(self, shares: Sequence[float]) -> np.ndarray:
        """Return the source of each row of a cycle, (CYCLE,) int64."""
        exact = np.array(shares, np.float64) / sum(shares) * self.CYCLE
        rows = np.floor(exact).astype(np.int64)  # of each source in a cycle; those with the largest rest get one more
        rows[np.argsort(rows - exact, kind="stable")[: self.CYCLE - rows.sum()]] += 1
        done, order = np.zeros_like(rows), np.empty(self.CYCLE, np.int64)
        size = np.maximum(rows, 1)
        for n in range(self.CYCLE):
            first, last = done * self.CYCLE // size, -(-(done + 1) * self.CYCLE // size)
            order[n] = np.argmin(np.where((first <= n) & (done < rows), last, 2 * self.CYCLE))
            done[order[n]] += 1
        return order


def read_phases(mix: dict[str, Any], steps: int) -> list[tuple[int, list[float]]]:
    """Return (first step, share of each source) of each phase of a mixture, from its flag.

    mix: source -> its share, as "0.6,0.2@0.8": 0.6 at first, 0.2 after 80 % of the `steps` of the run; a number of at
    least 1 behind @ is a step. Raises ValueError for what is no such text, for shares that are negative, and where
    nothing has a share.
    """
    changes: dict[str, dict[int, float]] = {}
    for name, text in mix.items():
        changes[name] = {}
        for number, part in enumerate(str(text).split(",")):
            share, _, place = part.partition("@")
            try:
                at = float(place) if number else 0.0
                if not number and place:
                    raise ValueError
                changes[name][round(at * steps) if at < 1 else int(at)] = float(share)
            except (ValueError, OverflowError):
                raise ValueError(
                    f"--data.mix {name} {text}: expected a share, and later ones with their place, such as "
                    "0.6,0.2@0.8 (0.2 from 80 % of the run on) or 0.6,0.2@9000 (from step 9000 on)"
                ) from None
            if not 0 <= float(share) < float("inf") or not 0 <= at < float("inf"):
                raise ValueError(f"--data.mix {name} {text}: shares and places should not be negative")
    phases = []
    for start in sorted({at for each in changes.values() for at in each}):
        shares = [each[max(at for at in each if at <= start)] for each in changes.values()]
        if not sum(shares):
            raise ValueError(f"--data.mix: all shares are 0 from step {start} on")
        phases.append((start, shares))
    return phases

"""Scores of many items as one number with its 95 % interval, and the difference of two models on the same items.

A score of an item is a pair (amount, of): 1 of 1 for a right answer, nats of tokens for a loss. The score of all items
is the sum of the amounts divided by the sum of what they are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.task import Share

Scores = Mapping[str, Sequence[float]]  # name of the score -> amount, of
Z = 1.959964  # 97.5 % of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval, and on how many items it rests."""

    value: float
    low: float
    high: float
    items: int

    def __str__(self) -> str:
        return f"{self.value:8.4f}  ({self.low:.4f} to {self.high:.4f})"


def estimate(scores: Sequence[Sequence[float]]) -> Estimate:
    """Return the sum of the amounts over the sum of what they are of, for scores (n, 2), n at least 1.

    The interval of counted items is Wilson's (1927); of other scores that of a ratio of means (Cochran 1977, 6.4).
    """
    pairs = np.asarray(scores, np.float64)  # (n, 2)
    amount, of = pairs.T  # (n,) each
    if (of == 1).all() and np.isin(amount, (0, 1)).all():
        low, high = Share(int(amount.sum()), len(pairs)).interval()
        return Estimate(float(amount.mean()), low, high, len(pairs))
    value, error = amount.sum() / of.sum(), Z * _standard_error(_influence(pairs))
    return Estimate(float(value), float(value - error), float(value + error), len(pairs))


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Estimate:
    """Return the score of `ours` minus that of `theirs` with the interval of paired items, which is far narrower than
    the two intervals together: items that are hard are hard for both."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)  # (n, 2), item by item
    value = ours[:, 0].sum() / ours[:, 1].sum() - theirs[:, 0].sum() / theirs[:, 1].sum()
    # the influences are subtracted item by item, so what both models find hard cancels
    error = Z * _standard_error(_influence(ours) - _influence(theirs))
    return Estimate(float(value), float(value - error), float(value + error), len(ours))


def _influence(pairs: np.ndarray) -> np.ndarray:
    """Return how much each item moves the ratio of the sums, (n,) for pairs (n, 2)."""
    amount, of = pairs.T  # (n,) each
    # the ratio R = sum(amount) / sum(of), linear in the items: item i moves it by (amount_i - R of_i) / sum(of)
    return (amount - amount.sum() / of.sum() * of) / of.sum()


def _standard_error(influence: np.ndarray) -> float:
    """Return the standard error of a sum from what each of n items adds to it; infinite for a single item."""
    n = len(influence)
    # the influences have mean 0; n / (n - 1) makes their variance unbiased
    return float(np.sqrt((influence**2).sum() * n / (n - 1))) if n > 1 else float("inf")


def estimates(scores: Sequence[Scores]) -> dict[str, Estimate]:
    """Return the estimate of each name over the items that have such a score."""
    names = dict.fromkeys(name for item in scores for name in item)
    return {name: estimate([item[name] for item in scores if name in item]) for name in names}

"""What a row of the table of oracles is (`python -m tests.oracles`), and what the rows' functions share.

The inputs are those of the tests, where these keep them in functions or tables. What a row needs of the tests is
imported when it is measured, because a test module skips where the package that it compares with is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """One line of the table; the error is at most `bound`."""

    algorithm: str
    oracle: str
    tried: str
    bound: float
    measure: Callable[[], float]


ROWS: list[Row] = []


def row(algorithm: str, oracle: str, tried: str, bound: float) -> Callable:
    """Decorator: a function without arguments that returns the largest error is a row of the table."""

    def add(measure: Callable[[], float]) -> Callable[[], float]:
        ROWS.append(Row(algorithm, oracle, tried, bound, measure))
        return measure

    return add


def room(name: str) -> ModuleType:
    """A module of the tests."""
    return importlib.import_module(name)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest |a - b| / (1 + |b|): absolute where numbers are small, relative where they are large."""
    return ((ours - theirs).abs() / (1 + theirs.abs())).max().item() if ours.numel() else 0.0


def differing(pairs: Iterable[tuple[object, object]]) -> float:
    """How many pairs are not equal."""
    return float(sum(a != b for a, b in pairs))

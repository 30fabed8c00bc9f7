"""Texts that begin alike, computed together: what they share is computed once.

The two sentences of a minimal pair, or the answers to a question, begin alike and part later. They are put into one
row: the ids of the first text, then those of the second from where it parts from the first, and so on. Each id has the
position that it has in its own text, and sees the ids of its own text only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from attention.cache import KVCache, View
from decoding.params import Ids, shared_length


@dataclass
class Branches:
    """Some texts in one row, without the first ids that all rows share."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """position of each id in its text"""
    paths: dict[Ids, list[int]] = field(default_factory=dict)
    """for each text, the places of its ids in the row"""

    def add(self, text: Ids, past: int, shared: int) -> None:
        """Add a text whose ids from `past` on begin with `shared` ids of the text before it."""
        path = self.paths[next(reversed(self.paths))][:shared] if shared else []
        self.paths[text] = [*path, *range(len(self.ids), len(self.ids) + len(text) - past - shared)]
        self.ids += text[past + shared :]
        self.positions += range(past + shared, len(text))

    def mask(self, past: int, width: int) -> torch.Tensor:
        """Return which of `past` ids before the row and of its own, padded to `width`, each id sees, (T, S) bool."""
        seen = torch.eye(width, past + width, dtype=torch.bool).roll(past, 1)  # padding sees itself: else it is NaN
        seen[:, :past] = True
        done = 0  # ids of the row that stand in a text so far
        for path in self.paths.values():
            shared = sum(place < done for place in path)
            end = done + len(path) - shared
            seen[done:end, [past + place for place in path[:shared]]] = True
            seen[done:end, past + done : past + end] = torch.ones(end - done, end - done, dtype=torch.bool).tril()
            done = end
        return seen


def join(texts: Collection[Ids], past: int, dim: int, most: int) -> list[Branches]:
    """Return the texts in rows, the shortest row first; those that begin alike share one where this takes less time.

    past: number of first ids that all share, which no row has. dim: the model's; 0: each text has a row of its own.
    most: texts of a row, so that its memory has a limit.
    """
    rows: list[Branches] = []
    before: Ids = ()
    for text in sorted(texts):  # neighbours share most
        n, shared = len(text) - past, shared_length(before, text) - past
        # A shared id saves about 24 dim² operations a layer. Attention takes 4 dim for each place of a row that an id
        # might see, whether it does or not, and its operations take about four times as long as those of products.
        old = len(rows[-1].ids) if rows else 0
        longer = (old + n - shared) ** 2 - old**2 - n**2
        if not (dim and rows) or shared < 1 or len(rows[-1].paths) == most or 1.5 * dim * shared <= longer:
            rows.append(Branches())
            shared = 0
        rows[-1].add(text, past, shared)
        before = text
    return sorted(rows, key=lambda row: len(row.ids))


class BranchCache:
    """The keys and values of the ids before the rows, as `Transformer` reads them; those of the rows are not kept."""

    def __init__(self, prefix: KVCache, past: int, rows: Sequence[Branches], width: int) -> None:
        """prefix: has one row, with the `past` ids. width: of the rows, in ids."""
        self.prefix, self.past, self.length, device = prefix, past, past + width, prefix.keys.device
        if all(len(row.paths) == 1 for row in rows):  # each id sees those before it: one mask for all rows
            rows = [max(rows, key=lambda row: len(row.ids))]
        padded = [[*row.positions, *[past] * (width - len(row.ids))] for row in rows]
        self.positions = torch.tensor(padded, device=device)  # (B or 1, T)
        self.mask = torch.stack([row.mask(past, width) for row in rows])[:, None].to(device)  # (B or 1, 1, T, S)
        if prefix.window is not None:
            keys = torch.cat([torch.arange(past, device=device).expand(len(rows), -1), self.positions], dim=1)  # (B, S)
            self.mask &= (self.positions[:, :, None] - keys[:, None] < prefix.window)[:, None]

    def passes(self, T: int) -> list[int]:
        """Return how many of T ids a forward pass takes: all."""
        return [T]

    def extend(self, positions: torch.Tensor | None, T: int = 0, lengths: Sequence[int] | None = None) -> View:
        """Return the positions of the ids of the rows, and what they see."""
        return View(self.positions, self.mask, self.length, None)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values (B, K, S, D) of one layer, with those of the rows, k and v (B, K, T, D)."""
        if not self.past:
            return k, v
        before = (
            each[layer, :, :, : self.past].expand(len(k), -1, -1, -1) for each in (self.prefix.keys, self.prefix.values)
        )
        return tuple(torch.cat(both, dim=2) for both in zip(before, (k, v)))  # type: ignore[return-value]

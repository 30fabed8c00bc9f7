"""Samples -> batches: a packing divides samples among rows, and every sample is trained as if it were alone.

A sample of n ids takes n - 1 positions of a row: inputs ids[:-1], targets ids[1:].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from chat.samples import Samples
from dataset import IGNORE, Batch, check_batch_shape, rows_of_rank

WIDTH_STEP = 16  # padded batches are multiples of it wide: few shapes, for the sake of compilers and kernels


class Rows(NamedTuple):
    """The rows of one epoch. Row n holds pieces[starts[n] : starts[n + 1]], one after another."""

    order: np.ndarray  # (rows,) int64: row numbers in the order of training
    pieces: np.ndarray  # (pieces, 3) int64: a sample, its first position in this row, and the one after its last
    starts: np.ndarray  # (rows + 1,) int64

    def row(self, number: int) -> np.ndarray:
        """Return the pieces of a row, (n, 3). Row -1, which only fills the last step, has none."""
        return self.pieces[self.starts[number] : self.starts[number + 1]] if number >= 0 else self.pieces[:0]


def whole(items: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the pieces (n, 3) that hold each of `items` (n,) uncut."""
    return np.stack([items, np.zeros_like(items), sizes[items]], axis=1)  # three of (n,) -> (n, 3)


@dataclass(frozen=True, eq=False)
class Packer:
    """A way of dividing items (samples, or pairs of them) among rows; the number of rows is the same in every epoch."""

    sizes: np.ndarray  # (items,) int64: positions of each item
    capacity: int  # positions of a row
    batch_size: int  # rows of a step
    shares_rows: ClassVar[bool] = False  # a row may hold several items; all rows are then `capacity` wide
    cuts: ClassVar[bool] = False  # an item may be longer than a row

    def rows_of_epoch(self, random: np.random.Generator | None) -> Rows:
        """Return the rows of the epoch that `random` is seeded for; None: one fixed order, for evaluation."""
        raise NotImplementedError

    def shuffled(self, n_rows: int, random: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
        """Return all row numbers and all item numbers, in random order if there is `random`.

        Every packing draws both, rows first: another sequence of draws would change the batches of every run.
        """
        rows, items = np.arange(n_rows), np.arange(len(self.sizes))
        return (rows, items) if random is None else (random.permutation(rows), random.permutation(items))


class BestFit(Packer):
    """Rows with as many items as fit. The sizes that share a row are fixed; items of equal size swap every epoch."""

    shares_rows = True

    def rows_of_epoch(self, random: np.random.Generator | None) -> Rows:
        row_of = best_fit(np.sort(self.sizes)[::-1], self.capacity)  # (items,) of the largest, the second largest, ...
        ranks = np.argsort(row_of, kind="stable")  # (items,) rank by size of each item, row by row
        starts = np.append(0, np.cumsum(np.bincount(row_of)))  # (rows + 1,)
        order, items = self.shuffled(len(starts) - 1, random)
        # The sort is stable: among items of equal size the random order stays, so each epoch deals them out anew.
        by_size = items[np.argsort(-self.sizes[items], kind="stable")]
        return Rows(order, whole(by_size[ranks], self.sizes), starts)


class Concatenation(Packer):
    """One item after another, cut where a row ends; the rest begins the next row, without what came before it."""

    shares_rows, cuts = True, True

    def rows_of_epoch(self, random: np.random.Generator | None) -> Rows:
        row_begins = np.arange(0, self.sizes.sum(), self.capacity)  # (rows,) in the stream of all positions
        order, items = self.shuffled(len(row_begins), random)
        ends = np.cumsum(self.sizes[items])  # (items,) in the same stream
        # A piece begins where an item or a row begins, and ends where the next piece begins.
        begins = np.union1d(row_begins, ends[:-1])  # (pieces,)
        stops = np.append(begins[1:], ends[-1])
        place = np.searchsorted(ends, begins, side="right")  # (pieces,) indices into `items`
        origin = ends[place] - self.sizes[items[place]]  # (pieces,) where the item of each piece begins
        pieces = np.stack([items[place], begins - origin, stops - origin], axis=1)  # (pieces, 3)
        return Rows(order, pieces, np.append(np.searchsorted(begins, row_begins), len(begins)))


class OneEach(Packer):
    """One item a row, padded to the longest of the step. The fixed order is that of the items."""

    def rows_of_epoch(self, random: np.random.Generator | None) -> Rows:
        n = len(self.sizes)
        _, items = self.shuffled(n, random)
        return Rows(np.arange(n), whole(items, self.sizes), np.arange(n + 1))


class Buckets(OneEach):
    """One item a row, and items of about the same size in a step."""

    def rows_of_epoch(self, random: np.random.Generator | None) -> Rows:
        rows = super().rows_of_epoch(random)
        order = np.argsort(-(-rows.pieces[:, 2] // WIDTH_STEP), kind="stable")  # (rows,) by width
        if random is None:
            return rows._replace(order=order)
        # The last step may not be full. It takes its rows from a random place of the order: from its end, they would be
        # the longest samples in every epoch.
        n_full = len(order) // self.batch_size
        cut = int(random.integers(n_full + 1)) * self.batch_size
        rest = np.s_[cut : cut + len(order) - n_full * self.batch_size]
        steps = np.delete(order, rest).reshape(n_full, self.batch_size)  # (full steps, rows of a step)
        return rows._replace(order=np.concatenate([random.permutation(steps).ravel(), order[rest]]))


PACKINGS: dict[str, type[Packer]] = {"best_fit": BestFit, "concat": Concatenation, "bucket": Buckets, "none": OneEach}


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Put each size into the row with the least space that still holds it, or else into a new row.

    `sizes` (n,) in falling order, all in 1..capacity. Returns the row of each, (n,) int64, rows numbered from 0.
    Falling sizes make it best-fit-decreasing: at most 11/9 of the fewest possible rows + 4 (Johnson et al. 1974).
    """
    rows = np.empty(len(sizes), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by their space
    spaces = 0  # bit s is set while a row with space s is open, so a shift leaves the spaces that hold a size
    n_rows = 0
    for i, size in enumerate(sizes.tolist()):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1  # the lowest bit is the least space
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, n_rows
            n_rows += 1
        rows[i] = row
        if space > size:
            open_rows[space - size].append(row)
            spaces |= 1 << (space - size)
    return rows


# --- rows -> batches --------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class SFTData:
    """A batch source over samples that trains every sample exactly once an epoch, over all ranks.

    In a row of several samples each has a doc_id of its own and positions from 0, so that it is trained as if it were
    alone; the rest of a row has doc_id -1. Rows of one sample have no doc_ids and no positions, because a causal model
    does not see the padding that follows. Each epoch has other combinations of samples and another order of its
    `n_rows` rows. Raises ValueError on numbers out of range, and on samples that do not fit a row.
    """

    samples: Samples  # at least 2 ids each, and at most seq_len + 1 unless the packing cuts them
    seq_len: int  # T, positions of a row, or of the longest one
    batch_size: int  # rows of one optimizer step, over all ranks
    seed: int  # seed of combinations and order
    packing: str = "best_fit"  # a key of `PACKINGS`; the class says how samples share rows
    shuffle: bool = True  # False keeps one order for all epochs, for evaluation
    groups: np.ndarray | None = None  # (samples,) integers from 0; batches then hold the group of each target
    per_sample: bool = False  # the loss weight of each target is 1 / the number of targets of its sample

    packings: ClassVar[tuple[str, ...]] = tuple(PACKINGS)
    samples_per_item: ClassVar[int] = 1  # consecutive samples that share a row
    batch_type: ClassVar[type[Batch]] = Batch

    def __post_init__(self) -> None:
        self._offsets = self.samples.offsets.astype(np.int64)  # uint64 mixed with int64 would give floats
        self._lengths = np.diff(self._offsets) - 1  # (samples,) positions
        self._check()
        self._targets = np.where(self.samples.mask, self.samples.ids, np.int32(IGNORE))  # (tokens,)
        sizes = self._lengths.reshape(-1, self.samples_per_item).sum(1)  # (samples,) -> (items, 1 or 2) -> (items,)
        self._packer = PACKINGS[self.packing](sizes, self.samples_per_item * self.seq_len, self.batch_size)
        self._several = self._packer.shares_rows or self.samples_per_item > 1  # samples in a row
        self._epoch: tuple[int, Rows | None] = (-1, None)
        self.n_rows: int = len(self._rows(0).order)
        self.steps_per_epoch: int = -(-self.n_rows // self.batch_size)

    def _check(self) -> None:
        n, lengths = len(self.samples), self._lengths
        if self.packing not in self.packings:
            raise ValueError(f"packing is one of {', '.join(self.packings)}, found {self.packing!r}")
        check_batch_shape(self.seq_len, self.batch_size, self.seed)
        if not n:
            raise ValueError("expected samples to train on, found none")
        if n % self.samples_per_item:
            raise ValueError(f"expected {self.samples_per_item} samples for each pair, found {n} in all")
        if self.groups is not None and len(self.groups) != n:
            raise ValueError(f"expected a group for each of the {n} samples, found {len(self.groups)}")
        if lengths.min() < 1 or (lengths.max() > self.seq_len and not PACKINGS[self.packing].cuts):
            raise ValueError(
                f"samples should have 2 to {self.seq_len + 1} ids with seq_len {self.seq_len}, "
                f"found {lengths.min() + 1} to {lengths.max() + 1}; encode them with the same seq_len"
            )

    @property
    def packing_efficiency(self) -> float:
        """The share of the positions of the first epoch's rows that samples take; the rest is padding."""
        rows = self._rows(0)
        steps = [rows.order[at : at + self.batch_size] for at in range(0, self.n_rows, self.batch_size)]
        return float(self._lengths.sum() / sum(len(step) * self._width(rows, step) for step in steps))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the batch_size // world rows of `rank` in the global `step`; they are as wide on every rank."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        rows = self._rows(epoch)
        numbers = rows_of_rank(rows.order, step_of_epoch, self.batch_size, rank, world)
        of_all_ranks = rows.order[step_of_epoch * self.batch_size : (step_of_epoch + 1) * self.batch_size]
        return self._fill([rows.row(number) for number in numbers], self._width(rows, of_all_ranks))

    def origins(self, step: int, rank: int = 0, world: int = 1) -> list[str]:
        """Return the numbers, from 0 on, of the samples in each row of `rank` in the global `step`."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        rows = self._rows(epoch)
        numbers = rows_of_rank(rows.order, step_of_epoch, self.batch_size, rank, world)
        return ["samples " + ", ".join(str(int(piece[0])) for piece in rows.row(number)) for number in numbers]

    def _rows(self, epoch: int) -> Rows:
        """Return the rows of an epoch; those of the last call are kept."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._divide(np.random.default_rng((self.seed, epoch)) if self.shuffle else None))
        return self._epoch[1]

    def _divide(self, random: np.random.Generator | None) -> Rows:
        return self._packer.rows_of_epoch(random)

    def _width(self, rows: Rows, numbers: np.ndarray) -> int:
        """Return the width of a batch of the rows with these numbers."""
        if self._several:
            return self._packer.capacity
        longest = int(rows.pieces[numbers, 2].max())  # each row is one whole sample: piece n is row n
        return min(self.seq_len, -(-longest // WIDTH_STEP) * WIDTH_STEP)

    def _fill(self, rows: list[np.ndarray], width: int) -> Batch:
        """Return a batch of len(rows) = B rows, which hold these pieces (n, 3) from the left end on."""
        sample, first, last = np.concatenate(rows).T  # (pieces, 3) -> three of (pieces,)
        size = last - first
        # The positions of all pieces are listed one after another, (N,). Pieces leave no gap between them, so this is
        # the order of the True elements of `filled`, row by row.
        position = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)  # (N,) 0, 1, ... in each piece
        source = np.repeat(self._offsets[sample] + first, size) + position  # (N,) indices into samples.ids
        used = np.array([(pieces[:, 2] - pieces[:, 1]).sum() for pieces in rows])  # (B,)
        filled = np.arange(width) < used[:, None]  # (B, T)

        def grid(values: np.ndarray, padding: int, dtype: type) -> torch.Tensor:
            array = np.full(filled.shape, padding, dtype)
            array[filled] = values  # (N,) -> (B, T)
            return torch.from_numpy(array)

        fields = {"tokens": grid(self.samples.ids[source], 0, np.int64)}
        fields["targets"] = grid(self._targets[source + 1], IGNORE, np.int64)
        if self._several:
            fields["positions"] = grid(position, 0, np.int64)
            fields["doc_ids"] = grid(np.repeat(self._doc_ids(rows), size), -1, np.int32)
        if self.groups is not None:
            fields["groups"] = grid(np.repeat(self.groups[sample], size), 0, np.int64)
        if self.per_sample:
            # Targets of the whole sample, even where a row cuts it. The first id is never one: nothing precedes it.
            n_targets = [self.samples.mask[self._offsets[i] + 1 : self._offsets[i + 1]].sum() for i in sample]
            fields["loss_weights"] = grid(np.repeat(1 / np.maximum(1, n_targets), size), 0, np.float32)
        return self.batch_type(**fields)

    def _doc_ids(self, rows: list[np.ndarray]) -> np.ndarray:
        """Return the doc_id of each piece, (pieces,): they are numbered from 0 in each row."""
        return np.concatenate([np.arange(len(pieces)) for pieces in rows])


class PairBatch(Batch):
    """A batch whose losses are of pairs, not of tokens."""

    @property
    def n_targets(self) -> int:
        """Number of pairs in the batch."""
        return int((self.doc_ids.unique() >= 0).sum()) // 2


@dataclass(eq=False, repr=False)
class PairData(SFTData):
    """A batch source over pairs (of `encode_pairs`) that trains every pair exactly once an epoch, over all ranks.

    A pair is two samples of up to seq_len positions in a row of 2 seq_len positions, so that any pair fits. The chosen
    text of pair i has doc_id 2 (first + i), the rejected one the next, the rest of a row -1. The pairs that share a row
    are the same in every epoch; the order of the rows changes.
    """

    first: int = 0  # number of the first pair, where several sources share one numbering

    packings = ("best_fit", "none")  # no pair is cut, and every row is as wide as any pair needs
    samples_per_item = 2
    batch_type = PairBatch

    @property
    def n_pairs(self) -> int:
        """Number of pairs in an epoch."""
        return len(self.samples) // 2

    def _divide(self, random: np.random.Generator | None) -> Rows:
        rows = self._packer.rows_of_epoch(None)
        # A piece of `rows` is a pair. It becomes two pieces, so all indices into pieces double.
        order = rows.order if random is None else random.permutation(rows.order)
        texts = (2 * rows.pieces[:, :1] + (0, 1)).ravel()  # (pairs, 1) -> (pairs, 2) -> (2 pairs,)
        return Rows(order, whole(texts, self._lengths), 2 * rows.starts)

    def _doc_ids(self, rows: list[np.ndarray]) -> np.ndarray:
        """Return the doc_id of each piece, (pieces,): the number of its text."""
        return 2 * self.first + np.concatenate(rows)[:, 0]

"""Samples -> batches: one sample a row or several, each trained as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import numpy as np
import torch

from chat.samples import Samples
from dataset import IGNORE, Batch, rows_of_rank
from tuning.args import Packing

WIDTH_STEP = 16  # padded batches are multiples of it wide: few shapes, for the sake of compilers and kernels


class SFTData:
    """A batch source over samples in which every sample is trained exactly once an epoch, over all ranks.

    A sample of n ids takes n - 1 positions of a row: inputs ids[:-1], targets ids[1:]. In a packed row every sample
    has a doc_id of its own and positions from 0, so that it is trained as if it were alone; the rest of a row has
    doc_id -1. How the samples are combined and the order of the rows are others in every epoch, but the number of
    rows is not.

    packing "best_fit": rows of seq_len filled with as many samples as fit. The sizes that share a row are found once,
        and in an epoch samples of equal size are dealt out anew.
    "concat": one sample after another, cut where a row ends; the rest goes on in the next row, without what came
        before it. Nothing is padded but the last row, and samples of any length are taken whole.
    "bucket": one sample a row and samples of about the same length in a step, padded to its longest.
    "none": one sample a row, padded to the longest of the step.
    Padded rows have no doc_ids and no positions: a causal model does not see what follows.

    Args:
        samples: of at least 2 ids each, and at most seq_len + 1 unless they are concatenated.
        seq_len: T, positions of a row, or of the longest one.
        batch_size: rows of one optimizer step, over all ranks.
        seed: of combinations and order.
        packing: as above.
        shuffle: False keeps one order for all epochs, for evaluation; with packing "none" the order of the samples.
        groups: (samples,) integers from 0; batches then tell the group of each target.
        per_sample: batches weigh each target with 1 / the number of targets of its sample.

    `n_rows` is the number of rows of an epoch that hold samples, `steps_per_epoch` that of its optimizer steps.

    Raises ValueError on numbers that make no sense, and on samples that are none or do not fit.
    """

    def __init__(
        self,
        samples: Samples,
        seq_len: int,
        batch_size: int,
        seed: int,
        packing: Packing = "best_fit",
        shuffle: bool = True,
        groups: np.ndarray | None = None,
        per_sample: bool = False,
    ) -> None:
        if packing not in get_args(Packing):
            raise ValueError(f"packing is one of {', '.join(get_args(Packing))}, found {packing!r}")
        if seq_len < 1 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"expected seq_len >= 1, batch_size >= 1 and seed >= 0, found {seq_len}, {batch_size} and {seed}"
            )
        if not len(samples):
            raise ValueError("there is no sample to train on")
        if groups is not None and len(groups) != len(samples):
            raise ValueError(f"expected a group for each of the {len(samples)} samples, found {len(groups)}")
        self.samples, self.seq_len, self.batch_size, self.seed = samples, seq_len, batch_size, seed
        self.packing, self.shuffle, self.groups, self.per_sample = packing, shuffle, groups, per_sample
        self._offsets = samples.offsets.astype(np.int64)  # uint64 mixed with int64 would give floats
        self._lengths = np.diff(self._offsets) - 1  # positions
        self._targets = np.where(samples.mask, samples.ids, np.int32(IGNORE))
        self._columns = np.arange(seq_len)
        longest = int(self._lengths.max()) if packing == "concat" else seq_len
        if self._lengths.min() < 1 or self._lengths.max() > longest:
            raise ValueError(
                f"samples should have 2 to {seq_len + 1} ids for rows of {seq_len}, "
                f"found {self._lengths.min() + 1} to {self._lengths.max() + 1}; encode them with the same seq_len"
            )
        if packing == "best_fit":
            row_of = best_fit(np.sort(self._lengths)[::-1], seq_len)  # of each place: places go by falling size
            self._places = np.argsort(row_of, kind="stable")
            self._row_starts = np.append(0, np.cumsum(np.bincount(row_of)))
            self.n_rows = len(self._row_starts) - 1
        else:
            self.n_rows = -(-int(self._lengths.sum()) // seq_len) if packing == "concat" else len(samples)
        self._epoch: tuple[int, np.ndarray, np.ndarray, np.ndarray] = (-1, *[np.empty(0, np.int64)] * 3)
        self.steps_per_epoch: int = -(-self.n_rows // batch_size)

    @property
    def packing_efficiency(self) -> float:
        """The share of the positions of the first epoch's rows that samples take; the rest is padding."""
        if self.packing in ("best_fit", "concat"):
            return float(self._lengths.sum() / (self.n_rows * self.seq_len))
        order, members, _ = self._deal(0)
        steps = [order[at : at + self.batch_size] for at in range(0, self.n_rows, self.batch_size)]
        return float(self._lengths.sum() / sum(len(step) * self._width(members[step]) for step in steps))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch_size // world rows of `rank` in the global `step`, which are as wide on every rank."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, *self._deal(epoch))
        _, order, members, _ = self._epoch
        rows = rows_of_rank(order, step_of_epoch, self.batch_size, rank, world)
        packed = self.packing in ("best_fit", "concat")
        of_step = order[step_of_epoch * self.batch_size : (step_of_epoch + 1) * self.batch_size]
        shape = (len(rows), self.seq_len if packed else self._width(members[of_step]))
        filled = {"tokens": np.zeros(shape, np.int64), "targets": np.full(shape, IGNORE, np.int64)}
        if packed:
            filled |= {"positions": np.zeros(shape, np.int64), "doc_ids": np.full(shape, -1, np.int32)}
        if self.per_sample:
            filled["loss_weights"] = np.zeros(shape, np.float32)
        if self.groups is not None:
            filled["groups"] = np.zeros(shape, np.int64)
        for row, number in enumerate(rows[rows >= 0]):  # rows that only fill the last step come last
            at = 0
            for doc, (i, first, last) in enumerate(self._pieces(int(number))):
                self._fill(filled, np.s_[row, at : at + last - first], doc, i, first, last)
                at += last - first
        return Batch(**{name: torch.from_numpy(array) for name, array in filled.items()})

    def _fill(self, filled: dict[str, np.ndarray], here: tuple, doc: int, i: int, first: int, last: int) -> None:
        """Put the positions first..last of sample i, the row's document number `doc`, in their place."""
        start = self._offsets[i] + first
        filled["tokens"][here] = self.samples.ids[start : start + last - first]
        filled["targets"][here] = self._targets[start + 1 : start + 1 + last - first]
        if "doc_ids" in filled:
            filled["positions"][here] = self._columns[: last - first]
            filled["doc_ids"][here] = doc
        if "groups" in filled:
            filled["groups"][here] = self.groups[i]
        if "loss_weights" in filled:  # of the whole sample, should it be cut
            n_targets = self.samples.mask[self._offsets[i] + 1 : self._offsets[i + 1]].sum()
            filled["loss_weights"][here] = 1 / max(1, n_targets)

    def _pieces(self, number: int) -> Iterator[tuple[int, int, int]]:
        """What a row of the present epoch holds: samples, and from which of their positions to which."""
        _, _, members, ends = self._epoch
        if self.packing == "concat":
            at, stop = number * self.seq_len, min((number + 1) * self.seq_len, int(ends[-1]))
            place = int(np.searchsorted(ends, at, side="right"))
            while at < stop:
                i, end = int(members[place]), int(ends[place])
                begin, last = end - int(self._lengths[i]), min(stop, end)
                yield i, at - begin, last - begin
                at, place = last, place + 1
            return
        here = (
            np.s_[self._row_starts[number] : self._row_starts[number + 1]] if self.packing == "best_fit" else [number]
        )
        for i in members[here].tolist():
            yield i, 0, int(self._lengths[i])

    def _width(self, members: np.ndarray) -> int:
        """Of a padded batch with these samples."""
        return min(self.seq_len, -(-int(self._lengths[members].max()) // WIDTH_STEP) * WIDTH_STEP)

    def _deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For one epoch: the order of the rows, the samples row by row, and where each of them ends in a stream."""
        rows, samples = np.arange(self.n_rows), np.arange(len(self.samples))
        random = np.random.default_rng((self.seed, epoch))
        if self.shuffle:
            rows, samples = random.permutation(rows), random.permutation(samples)
        if self.packing == "best_fit":
            samples = samples[np.argsort(-self._lengths[samples], kind="stable")][self._places]
        elif self.packing == "bucket":
            rows = self._by_length(samples, random)
        elif self.packing == "none":
            rows = np.arange(self.n_rows)
        return rows, samples, np.cumsum(self._lengths[samples])

    def _by_length(self, samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """An order of rows that hold one of `samples` each, in which the rows of a step need about the same width."""
        order = np.argsort(-(-self._lengths[samples] // WIDTH_STEP), kind="stable")
        if not self.shuffle:
            return order
        n_whole = len(order) // self.batch_size  # steps; the rows of one that is not whole are taken from anywhere
        cut = int(random.integers(n_whole + 1)) * self.batch_size
        ragged = np.s_[cut : cut + len(order) - n_whole * self.batch_size]
        steps = np.delete(order, ragged).reshape(n_whole, self.batch_size)
        return np.concatenate([random.permutation(steps).ravel(), order[ragged]])


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit packing: each size goes to the row with the least space that still holds it, else opens a row.

    `sizes` (n,) in falling order, all in 1..capacity. Returns the row of each, (n,) int64, rows numbered from 0.
    Falling sizes make it best-fit-decreasing: at most 11/9 of the fewest possible rows + 4 (Johnson et al. 1974).
    """
    rows = np.empty(len(sizes), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by their space
    spaces = 0  # bit s is set when a row with space s is open: the least one that holds a size is one shift away
    n_rows = 0
    for i, size in enumerate(sizes.tolist()):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
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


class PairBatch(Batch):
    """A batch whose losses are of pairs, not of tokens."""

    @property
    def n_targets(self) -> int:
        """How many pairs are trained."""
        return int((self.doc_ids.unique() >= 0).sum()) // 2


class PairData:
    """A batch source over pairs in which every pair is trained exactly once an epoch, over all ranks.

    A row holds 2 seq_len positions, so that any pair fits. The chosen text of pair i has doc_id 2i, the rejected one
    2i + 1, the rest of a row -1; positions start from 0 in each text, so that it is seen as if it were alone. Which
    pairs share a row is found once; the order of the rows is another one in every epoch.

    Args:
        samples: from `encode_pairs`, with the same seq_len.
        seq_len: positions of the longest text.
        batch_size: rows of one optimizer step, over all ranks.
        seed: of the order.
        packing: "best_fit" fills rows with as many pairs as fit; "none" gives each pair a row.
        shuffle: False keeps one order for all epochs, for evaluation.
        first: the number of the first pair, where several sources are to number theirs apart.

    Raises ValueError on numbers that make no sense, and on samples that are none or do not fit.
    """

    def __init__(
        self,
        samples: Samples,
        seq_len: int,
        batch_size: int,
        seed: int,
        packing: str = "best_fit",
        shuffle: bool = True,
        first: int = 0,
    ) -> None:
        if packing not in ("best_fit", "none"):
            raise ValueError(f"packing is 'best_fit' or 'none', found {packing!r}")
        if seq_len < 1 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"expected seq_len >= 1, batch_size >= 1 and seed >= 0, found {seq_len}, {batch_size} and {seed}"
            )
        if not len(samples):
            raise ValueError("there is no pair to train on")
        self.samples, self.seq_len, self.batch_size, self.seed = samples, seq_len, batch_size, seed
        self.shuffle, self.first = shuffle, first
        self._offsets = samples.offsets.astype(np.int64)
        lengths = np.diff(self._offsets) - 1  # positions
        if len(lengths) % 2 or lengths.min() < 1 or lengths.max() > seq_len:
            raise ValueError(
                f"samples should be pairs of 2 to {seq_len + 1} ids for texts of {seq_len}, found {len(lengths)} of "
                f"{lengths.min() + 1} to {lengths.max() + 1}; encode them with the same seq_len"
            )
        self.n_pairs, self._width = len(lengths) // 2, 2 * seq_len
        sizes = lengths.reshape(-1, 2).sum(1)
        falling = np.argsort(-sizes, kind="stable")
        row_of = best_fit(sizes[falling], self._width) if packing == "best_fit" else np.arange(self.n_pairs)
        members = falling if packing == "best_fit" else np.arange(self.n_pairs)
        self._rows = np.split(
            members[np.argsort(row_of, kind="stable")], np.cumsum(np.bincount(row_of))[:-1]
        )  # the pairs of each row
        self.packing_efficiency = float(sizes.sum() / (self.n_rows * self._width))
        self.steps_per_epoch: int = -(-self.n_rows // batch_size)

    @property
    def n_rows(self) -> int:
        """Rows of an epoch that hold pairs."""
        return len(self._rows)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """The (batch_size // world, 2 seq_len) rows of `rank` in the global `step`."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        order = np.arange(self.n_rows)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        rows = rows_of_rank(order, step_of_epoch, self.batch_size, rank, world)
        shape = (len(rows), self._width)
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        positions, doc_ids = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
        ids, mask = self.samples.ids, self.samples.mask
        for row, number in enumerate(rows[rows >= 0]):  # rows that only fill the last step come last
            at = 0
            for text in (2 * self._rows[number][:, None] + (0, 1)).flatten().tolist():
                start, stop = self._offsets[text], self._offsets[text + 1]
                here = np.s_[row, at : at + stop - start - 1]
                tokens[here] = ids[start : stop - 1]
                targets[here] = np.where(mask[start + 1 : stop], ids[start + 1 : stop], IGNORE)
                positions[here] = np.arange(stop - start - 1)
                doc_ids[here] = 2 * self.first + text
                at += stop - start - 1
        return PairBatch(*map(torch.from_numpy, (tokens, targets, positions, doc_ids)))

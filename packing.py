"""Samples -> batches: several samples in a row, each trained as if it were alone."""

from __future__ import annotations

import numpy as np
import torch

from dataset import IGNORE, Batch, rows_of_rank
from dataset_sft import Samples


class SFTData:
    """A batch source over samples in which every sample is trained exactly once an epoch, over all ranks.

    A sample of n ids takes n - 1 positions of a row: inputs ids[:-1], targets ids[1:]. In a packed row every sample
    has a doc_id of its own and positions from 0, so that it is trained as if it were alone; the rest of a row has
    doc_id -1. How the samples are combined and the order of the rows are others in every epoch, but the number of
    rows is not: the sizes that share a row are found once, and in an epoch samples of equal size are dealt out anew.

    Args:
        samples: of at least 2 and at most seq_len + 1 ids each.
        seq_len: T, positions of a row.
        batch_size: rows of one optimizer step, over all ranks.
        seed: of combinations and order.
        packing: "best_fit" fills rows with as many samples as fit; "none" gives each sample a row (no doc_ids and no
            positions: a causal model does not see what follows).
        shuffle: False keeps one order for all epochs, for evaluation; with packing "none" the order of the samples.

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
    ) -> None:
        if packing not in ("best_fit", "none"):
            raise ValueError(f"packing is 'best_fit' or 'none', found {packing!r}")
        if seq_len < 1 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"expected seq_len >= 1, batch_size >= 1 and seed >= 0, found {seq_len}, {batch_size} and {seed}"
            )
        if not len(samples):
            raise ValueError("there is no sample to train on")
        self.samples, self.seq_len, self.batch_size, self.seed = samples, seq_len, batch_size, seed
        self.packing, self.shuffle = packing, shuffle
        self._offsets = samples.offsets.astype(np.int64)  # uint64 mixed with int64 would give floats
        self._lengths = np.diff(self._offsets) - 1  # positions
        self._targets = np.where(samples.mask, samples.ids, np.int32(IGNORE))
        self._columns = np.arange(seq_len)
        if self._lengths.min() < 1 or self._lengths.max() > seq_len:
            raise ValueError(
                f"samples should have 2 to {seq_len + 1} ids for rows of {seq_len}, "
                f"found {self._lengths.min() + 1} to {self._lengths.max() + 1}; encode them with the same seq_len"
            )
        # Without packing every sample takes a whole row, which is packing of that one size.
        self._sizes = self._lengths if packing == "best_fit" else np.full(len(samples), seq_len)
        row_of = best_fit(np.sort(self._sizes)[::-1], seq_len)  # of each place: places go by falling size
        self._places = np.argsort(row_of, kind="stable")
        self._row_starts = np.append(0, np.cumsum(np.bincount(row_of)))
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, row_of, row_of)
        self.steps_per_epoch: int = -(-self.n_rows // batch_size)

    @property
    def n_rows(self) -> int:
        """Rows of an epoch that hold samples."""
        return len(self._row_starts) - 1

    @property
    def packing_efficiency(self) -> float:
        """The share of the positions of an epoch's rows that samples take; the rest is padding."""
        return float(self._lengths.sum() / (self.n_rows * self.seq_len))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The (batch_size // world, seq_len) rows of `rank` in the global `step`."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, *self._deal(epoch))
        _, order, members = self._epoch
        rows = rows_of_rank(order, step_of_epoch, self.batch_size, rank, world)
        shape = (len(rows), self.seq_len)
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        positions, doc_ids = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
        for row, number in enumerate(rows[rows >= 0]):  # rows that only fill the last step come last
            at = 0
            for doc, i in enumerate(members[self._row_starts[number] : self._row_starts[number + 1]].tolist()):
                start, stop = self._offsets[i], self._offsets[i + 1]
                here = np.s_[row, at : at + stop - start - 1]
                tokens[here] = self.samples.ids[start : stop - 1]
                targets[here] = self._targets[start + 1 : stop]
                positions[here] = self._columns[: stop - start - 1]
                doc_ids[here] = doc
                at += stop - start - 1
        arrays = (tokens, targets, positions, doc_ids) if self.packing != "none" else (tokens, targets)
        return Batch(*map(torch.from_numpy, arrays))

    def _deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """For one epoch: the order of the rows, and the samples row by row as `_row_starts` cuts them."""
        rows, samples = np.arange(self.n_rows), np.arange(len(self.samples))
        if self.shuffle:
            random = np.random.default_rng((self.seed, epoch))
            rows, samples = random.permutation(rows), random.permutation(samples)
        falling = samples[np.argsort(-self._sizes[samples], kind="stable")]
        return rows, falling[self._places]


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

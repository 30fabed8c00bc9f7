"""Token bins on disk -> pretraining batches, as a pure function of (seed, step, rank, world)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch

from bins.mixture import Mixture
from bins.token_bin import TokenBin
from loss import IGNORE


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass; every field is (B, T), row by row aligned, on one device.

    A batch source is anything with `batch_size` (rows of one optimizer step over all ranks), `steps_per_epoch` and
    `batch(step, rank, world) -> Batch`: the rows of this rank for the global step counter (epoch = step //
    steps_per_epoch). The union over the ranks of a step is the same for every world size, and rows that only
    fill the last step of an epoch have no target.
    """

    tokens: torch.Tensor
    """int64 ids fed to the model."""
    targets: torch.Tensor
    """int64 ids to predict, already shifted by one; IGNORE (-100) where nothing is trained."""
    positions: torch.Tensor | None = None
    """int64, restarting at every document of a row; None means 0..T-1."""
    doc_ids: torch.Tensor | None = None
    """int32; attention never crosses a change of id, -1 is padding; None means one document a row."""
    loss_weights: torch.Tensor | None = None
    """float32 weight of each target's loss; None means 1."""
    groups: torch.Tensor | None = None
    """int64 number of the group (such as a task) to whose loss in the log a target counts; None: one group."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Number of targets that are trained."""
        return int((self.targets != IGNORE).sum())

    def split(self, size: int) -> list[Batch]:
        """Return micro-batches of `size` rows, as views; the last one may have fewer. 0: the whole batch."""
        size = size or len(self)
        return [self._map(lambda x, at=at: x[at : at + size]) for at in range(0, len(self), size)]

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device; the copy does not block when the memory is pinned."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: None if x is None else change(x) for name, x in tensors.items()})


class BatchSource(Protocol):
    """A source of batches; `Batch` describes its fields."""

    seq_len: int
    batch_size: int
    steps_per_epoch: int

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch: ...


def check_batch_shape(seq_len: int, batch_size: int, seed: int) -> None:
    """Raise ValueError on numbers out of range."""
    if seq_len < 1 or batch_size < 1 or seed < 0:
        raise ValueError(
            f"expected seq_len >= 1, batch_size >= 1 and seed >= 0, found {seq_len}, {batch_size} and {seed}"
        )


def check_division(batch_size: int, world: int) -> None:
    """Raise ValueError for rows of a step that do not divide over `world` ranks."""
    if batch_size % world:
        raise ValueError(
            f"--data.batch_size {batch_size} does not divide over {world} processes: use a multiple of {world}"
        )


def rows_of_rank(order: np.ndarray, step: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Return the rows of `rank` in `step` of an epoch with this `order` of rows, (batch_size // world,) int64.

    -1 stands for a row that only fills the last step. Raises ValueError when the rows of a step do not divide over
    the ranks: an uneven split would change what a step trains on with the number of processes.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside the world of {world} processes")
    check_division(batch_size, world)
    rows = order[step * batch_size : (step + 1) * batch_size]
    return np.pad(rows, (0, batch_size - len(rows)), constant_values=-1)[rank::world]


class PretrainData:
    """A batch source over token bins in which every token is a target exactly once an epoch, over all ranks.

    A bin is cut into windows of `seq_len` targets; the inputs are the tokens one place before, so windows overlap by
    one token and none is lost between them. The input before a bin's first token is its eos. The last window of a bin
    is filled up with eos that has no target.

    Args:
        bins: the token streams; their documents end with eos.
        seq_len: T, targets (and inputs) of a row.
        batch_size: rows of one optimizer step, over all ranks.
        seed: seed of the order of the windows, which changes every epoch.
        weights: number of visits of each bin in an epoch. With a fraction, each epoch reads another part: a bin of
            weight 0.25 has been read exactly once after four epochs. None means 1 each.
        shuffle: False reads bin after bin in order, for evaluation.
        isolate_documents: number the documents of a row (doc_ids) and restart the positions at each. The eos before
            a document then is its first input, so that the document's first token is predicted, too, without
            attention to the document before. A good pretraining loss does not need this.
        headerless_eos_id: eos of bins without a header (and so without offsets: there, eos ends a document).

    Raises ValueError on numbers out of range, and when the bins hold no token at all.
    """

    def __init__(
        self,
        bins: Sequence[TokenBin],
        seq_len: int,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        isolate_documents: bool = False,
        headerless_eos_id: int = 2,
    ) -> None:
        weights = [1.0] * len(bins) if weights is None else list(weights)
        if len(weights) != len(bins):
            raise ValueError(f"expected one weight for each of the {len(bins)} bins, found {len(weights)}")
        if not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError(f"the weights of bins should be finite and not negative, found {weights}")
        check_batch_shape(seq_len, batch_size, seed)
        self.bins, self.seq_len, self.batch_size, self.seed = list(bins), seq_len, batch_size, seed
        self.weights = weights
        self.shuffle, self.isolate_documents = shuffle, isolate_documents
        self.headerless_eos_id = headerless_eos_id
        self._windows = [-(-len(bin) // seq_len) for bin in bins]
        self._first = np.cumsum([0, *self._windows])  # (bins + 1,) number of a bin's first window among those of all
        self._visits = [round(weight * n) for weight, n in zip(weights, self._windows)]
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        if not sum(self._visits):
            raise ValueError(f"{len(bins)} token bins with weights {weights} give no token to train on")
        self.steps_per_epoch: int = -(-sum(self._visits) // batch_size)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the (batch_size // world, seq_len) rows of `rank` in the global `step`."""
        windows = self._windows_of(step, rank, world)
        # Arrays of (B, T+1): columns 0..T-1 are the inputs, 1..T the targets.
        ids = np.full((len(windows), self.seq_len + 1), self.headerless_eos_id, np.int64)
        exists = np.zeros((len(windows), self.seq_len + 1), bool)
        begins = np.zeros((len(windows), self.seq_len), bool)
        owner = np.searchsorted(self._first, windows, side="right") - 1  # (B,) bin of each; -1 without a window
        for i in np.unique(owner[owner >= 0]):
            ids[owner == i], exists[owner == i], begins[owner == i] = self._read(i, windows[owner == i])
        targets = np.where(exists[:, 1:], ids[:, 1:], IGNORE)
        positions, doc_ids = number_documents(begins, targets) if self.isolate_documents else (None, None)
        arrays = (ids[:, :-1], targets, positions, doc_ids)
        return Batch(*(None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in arrays))

    def origins(self, step: int, rank: int = 0, world: int = 1) -> list[str]:
        """Return where each row of `rank` in the global `step` comes from: its bin, tokens and documents, from 0 on."""
        told = []
        for window in self._windows_of(step, rank, world):
            i = int(np.searchsorted(self._first, window, side="right")) - 1
            first = int(window - self._first[i]) * self.seq_len
            if window < 0 or i < 0:
                told.append("a row that fills the last step")
                continue
            bin, last = self.bins[i], min(first + self.seq_len, len(self.bins[i])) - 1
            where = f"{bin.path.name}: tokens {first} to {last}"
            if bin.offsets is not None:
                a, b = np.searchsorted(np.asarray(bin.offsets, np.int64), [first, last], side="right") - 1
                where += f", documents {a} to {b}"
            told.append(where)
        return told

    def ledger(self, steps: int, left_out: Collection[int] = ()) -> list[dict[str, Any]]:
        """Return what the first `steps` steps have read, without the steps `left_out`: for each stretch of a bin of one
        source `bin`, `source`, its `tokens`, and `read`, how many tokens were targets, each as often as it was.

        A bos is counted, too, though it is no target.
        """
        visits = self._visits_in(steps)  # (windows,)
        for step in sorted({step for step in left_out if step < steps}):
            windows = self._windows_of(step, 0, 1)
            np.subtract.at(visits, windows[windows >= 0], 1)
        rows = []
        for i, bin in enumerate(self.bins):
            own = visits[self._first[i] : self._first[i + 1]]
            before = np.concatenate([[0], np.cumsum(own)])  # visits of earlier windows
            for source, *span in bin.parts():
                whole, rest = np.divmod(span, self.seq_len)
                begun = np.append(own, 0)[whole]  # visits of the window in which a stretch begins or ends
                first, end = (before[whole] * self.seq_len + begun * rest).tolist()
                rows.append({"bin": str(bin.path), "source": source, "tokens": span[1] - span[0], "read": end - first})
        return rows

    def _windows_of(self, step: int, rank: int, world: int) -> np.ndarray:
        """Return the windows of `rank` in the global `step`, (batch_size // world,) int64; -1: no window."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        return rows_of_rank(self._order[1], step_of_epoch, self.batch_size, rank, world)

    def _visits_in(self, steps: int) -> np.ndarray:
        """Return how often each window is read in the first `steps` steps, (windows,) int64."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        counts = np.zeros(self._first[-1], np.int64)
        for i, (n, visits) in enumerate(zip(self._windows, self._visits)):
            whole, more = divmod(epochs * visits, max(n, 1))
            counts[self._first[i] : self._first[i + 1]] = whole
            if more:
                counts[self._first[i] + self._permutation(i, n)[:more]] += 1
        np.add.at(counts, self._order_of(epochs)[: rest * self.batch_size], 1)
        return counts

    def _permutation(self, i: int, n: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, i)).permutation(n)

    def _order_of(self, epoch: int) -> np.ndarray:
        """Return the window numbers of one epoch in the order of training, (windows,) int64."""
        parts = []
        for i, (n, visits) in enumerate(zip(self._windows, self._visits)):
            if visits:
                # Each epoch takes the next `visits` windows of a fixed permutation that repeats without end. So after
                # any number of epochs each window of a bin has been read at most once more than any other.
                part = np.arange(epoch * visits, (epoch + 1) * visits) % n
                if visits % n:
                    part = self._permutation(i, n)[part]
                parts.append(self._first[i] + np.sort(part))
        order = np.concatenate(parts)
        return np.random.default_rng((self.seed, 1, epoch)).permutation(order) if self.shuffle else order

    def _read(self, i: int, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read windows (b,) of bin i.

        Returns ids (b, T+1); bool (b, T+1), False for an id that is no target: outside the bin, or a bos; bool (b, T),
        True for an input that starts a document.
        """
        bin, eos_id = self.bins[i], self.bins[i].meta.get("eos_id", self.headerless_eos_id)
        where = (windows - self._first[i])[:, None] * self.seq_len + np.arange(-1, self.seq_len)  # (b, T+1)
        exists = (where >= 0) & (where < len(bin))
        ids = np.where(exists, np.asarray(bin.tokens)[where.clip(0, len(bin) - 1)], eos_id)
        if not self.isolate_documents and not bin.bos:
            return ids, exists, np.False_
        if bin.offsets is None:
            return ids, exists, ids[:, :-1] == eos_id
        # The input before a document's first token starts it: its target is a document's offset. As int64, because
        # numpy compares uint64 with int64 as floats, and copies all of them to do so.
        starts = np.asarray(bin.offsets).view(np.int64)
        if bin.bos:  # bos is the first input of a document; nothing is to be learnt from what comes before it
            within = where - starts[np.searchsorted(starts, where, side="right") - 1]  # place in its document
            return ids, exists & (within >= len(bin.bos)), within[:, :-1] == 0
        nearest = starts[np.searchsorted(starts, where[:, 1:]).clip(max=len(starts) - 1)]
        return ids, exists, nearest == where[:, 1:]


def number_documents(begins: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (B, T) int64 and doc_ids (B, T) int32; `begins` (B, T) bool is True where a document starts."""
    columns = np.arange(begins.shape[1])
    # The running maximum of the columns that start a document is the start of each token's own document.
    positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    doc_ids = np.cumsum(begins, axis=1, dtype=np.int32)
    return positions, np.where(targets == IGNORE, np.int32(-1), doc_ids)


class MixedData(PretrainData):
    """A batch source that takes its rows from several sources in the shares of a Mixture.

    sources: the bins of each source. Its windows are read in a new random order each time that it begins anew: none is
        read again before all others of the source have been. An epoch has as many steps as there are rows in all.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[TokenBin]],
        phases: Sequence[tuple[int, Sequence[float]]],
        seq_len: int,
        batch_size: int,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__([bin for bins in sources for bin in bins], seq_len, batch_size, seed, **options)
        self.phases = [[step, list(shares)] for step, shares in phases]
        self.mixture = Mixture(phases, batch_size)
        ends = np.cumsum([0, *map(len, sources)])
        self._begins = self._first[ends]  # (sources + 1,) first window of each source
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source -> number of the pass, its order
        for number, n in enumerate(np.diff(self._begins)):
            if not n and any(shares[number] for _, shares in phases):
                raise ValueError(f"source {number + 1} of the mixture has no token to train on: leave it out")
        counts, windows = self.mixture.counts(self.steps_per_epoch), np.maximum(np.diff(self._begins), 1)
        self.weights = np.repeat((counts / windows).round(4), [len(each) for each in sources]).tolist()

    def _windows_of(self, step: int, rank: int, world: int) -> np.ndarray:
        sources, begun = self.mixture.sources(step), self.mixture.counts(step)
        windows = np.empty(self.batch_size, np.int64)
        for k in np.unique(sources):
            n = int(self._begins[k + 1] - self._begins[k])
            rows = begun[k] + np.arange((sources == k).sum())
            found = [
                self._begins[k] + self._order_in(k, each)[rows[rows // n == each] % n] for each in np.unique(rows // n)
            ]
            windows[sources == k] = np.concatenate(found)
        return rows_of_rank(windows, 0, self.batch_size, rank, world)

    def _visits_in(self, steps: int) -> np.ndarray:
        counts = np.zeros(self._first[-1], np.int64)
        for k, rows in enumerate(self.mixture.counts(steps).tolist()):
            n = int(self._begins[k + 1] - self._begins[k])
            passes, more = divmod(rows, max(n, 1))
            counts[self._begins[k] : self._begins[k + 1]] = passes
            if more:
                counts[self._begins[k] + self._order_in(k, passes)[:more]] += 1
        return counts

    def _order_in(self, k: int, number: int) -> np.ndarray:
        """Return the order of the windows of source `k` in its pass `number`, (n,) int64."""
        if self._orders.get(k, (-1,))[0] != number:
            n = int(self._begins[k + 1] - self._begins[k])
            self._orders[k] = number, np.random.default_rng((self.seed, 2, int(k), int(number))).permutation(n)
        return self._orders[k][1]


def composition(data: PretrainData, heldout: list[TokenBin]) -> list[dict[str, Any]]:
    """Return what the bins hold, for the record of the run: tokens, documents, tokens or documents by source.

    The weight of a bin is the number of times that an epoch reads it.
    """
    weights = [*data.weights, *[None] * len(heldout)]
    kept = ("documents", "text_bytes", "sources")
    return [
        {"name": str(each.path), "tokens": len(each), "weight": weight, "held_out": weight is None}
        | {name: each.meta[name] for name in kept if name in each.meta}
        for each, weight in zip([*data.bins, *heldout], weights)
    ]

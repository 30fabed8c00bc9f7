"""Pairs of answers -> samples -> batches, for preference tuning: both answers of a pair are in one row."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from chat_template import ChatTemplate
from conversations import PreferencePair, preference_pairs
from corpora.registry import BadRecord
from dataset import IGNORE, Batch, rows_of_rank
from dataset_sft import Samples, all_held_out, encode, nine_in_ten, only_last, set_aside
from packing import best_fit
from progress import track


def read_pairs(
    path: Path,
    template: ChatTemplate,
    seq_len: int,
    too_long: str = "cut",
    broken: list[BadRecord] | None = None,
    share: float = 0.0,
    aside: list[PreferencePair] | None = None,
) -> Samples:
    """The pairs at `path`, encoded by `encode_pairs`; the records that are none go to `broken`, with their places.

    The `share` of them that `set_aside` holds out is not encoded and goes to `aside`. Raises ValueError when nothing is
    left to train.
    """
    pairs = preference_pairs(path, [] if broken is None else broken, template.check)
    kept = set_aside(pairs, lambda pair: pair.prompt, share, [] if aside is None else aside)
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one shows the progress
    samples = encode_pairs(track(kept, f"encoding {path.name}", "pairs", active=first), template, seq_len, too_long)
    if not len(samples):
        if samples.stats["alike"] < samples.stats["pairs"]:
            raise ValueError(f"{path}: no pair has two different answers within {seq_len} tokens; raise --data.seq_len")
        if samples.stats["pairs"]:
            raise ValueError(f"{path}: the template makes the two answers of every pair the same")
        raise ValueError(all_held_out(path, share))
    return samples


def encode_pairs(
    pairs: Iterable[PreferencePair], template: ChatTemplate, seq_len: int, too_long: str = "cut"
) -> Samples:
    """Samples 2i and 2i + 1 are the conversations with the chosen and with the rejected answer of pair i, up to
    seq_len + 1 ids each; the last answer of each is trained.

    `too_long`: "cut" keeps the beginning of a text, "drop" leaves out pairs with one that is too long. A pair is left
    out, too, if an answer, or all that tells the two apart, lies beyond the cut, or if the template makes the answers
    alike. `.stats` counts them: pairs = kept + dropped + beyond + alike.
    """
    if too_long not in ("cut", "drop"):
        raise ValueError(f"too_long is 'cut' or 'drop', found {too_long!r}")
    ids, mask, offsets = array("i"), bytearray(), array("Q", [0])
    stats = dict.fromkeys(("pairs", "kept", "tokens", "targets", "cut", "dropped", "beyond", "alike"), 0)
    lengths = array("I")
    for pair in pairs:
        whole = [encode(only_last(messages), template) for messages in pair.conversations()]
        kept = [(sample[: seq_len + 1], trained[: seq_len + 1]) for sample, trained in whole]
        is_long = any(len(sample) > seq_len + 1 for sample, _ in whole)
        targets = [sum(trained[1:]) for _, trained in kept]  # nothing precedes the first id: it cannot be predicted
        stats["pairs"] += 1
        lengths.append(max(len(sample) for sample, _ in whole))
        if whole[0][0] == whole[1][0]:
            stats["alike"] += 1
        elif is_long and too_long == "drop":
            stats["dropped"] += 1
        elif not all(targets) or kept[0][0] == kept[1][0]:
            stats["beyond"] += 1
        else:
            for sample, trained in kept:
                ids.extend(sample)
                mask.extend(trained)
                offsets.append(len(ids))
            stats["kept"] += 1
            stats["targets"] += sum(targets)
            stats["cut"] += is_long
    stats["tokens"] = len(ids)
    flat = np.array(ids, np.int32), np.array(mask, bool), np.array(offsets, np.uint64)
    return Samples(*flat, stats, nine_in_ten(lengths))


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

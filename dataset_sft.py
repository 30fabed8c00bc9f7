"""Conversations -> masked, packed batches.

    files -> records -> conversations -> (ids, mask) by the chat template -> samples -> rows of seq_len

A conversation is `[{"role": "system" | "user" | "assistant", "content": str}, ...]`; what is trained is what the
template's mask says: the answers and their end tokens.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora.files import bad, find_files, format_of, records
from corpora.registry import BadRecord
from dataset import IGNORE, Batch, rows_of_rank
from tokenizer import ChatTemplate, check_messages

Messages = list[dict[str, Any]]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # other names of ours
SURROGATE = re.compile("[\ud800-\udfff]")  # bytes that were not UTF-8, or half a character: no tokenizer takes them
QUESTION_ANSWER = (
    ("prompt", "answer"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("input", "output"),
)


def chat(record: dict) -> Messages | None:
    """`messages` of OpenAI's API: `[{"role": "user", "content": "..."}, ...]`, `chat_rounds` of MFTCoder."""
    turns = record.get("messages") or record.get("chat_rounds")
    return [_turn(turn, "role", "content") for turn in turns] if isinstance(turns, list) else None


def sharegpt(record: dict) -> Messages | None:
    """`conversations` of ShareGPT: `[{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]`."""
    turns = record.get("conversations")
    return [_turn(turn, "from", "value") for turn in turns] if isinstance(turns, list) else None


def alpaca(record: dict) -> Messages | None:
    """`instruction`, `input` (may be missing or empty) and `output` of Alpaca."""
    if "instruction" not in record or "output" not in record:
        return None
    parts = (record["instruction"], record.get("input"))
    question = "\n".join(part for part in parts if isinstance(part, str) and part.strip())
    return _exchange(question, record["output"])


def question_answer(record: dict) -> Messages | None:
    """One of the pairs of keys in QUESTION_ANSWER."""
    for question, answer in QUESTION_ANSWER:
        if question in record and answer in record:
            return _exchange(record[question], record[answer])
    return None


FORMATS: tuple[Callable[[dict], Messages | None], ...] = (chat, sharegpt, alpaca, question_answer)


def _turn(turn: Any, role: str, content: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is {type(turn).__name__}, expected an object with {role!r} and {content!r}")
    return {"role": turn.get(role), "content": turn.get(content)}


def _exchange(question: Any, answer: Any) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def to_messages(record: Any) -> Messages:
    """The conversation in a record of any of FORMATS: [system], then user and assistant in turn, ending in an answer.

    A last question that nobody answers is left out. Raises ValueError with the reason when a record is broken.
    """
    if not isinstance(record, dict):
        raise ValueError(f"the record is {type(record).__name__}, expected an object with named fields")
    messages = next((found for read in FORMATS if (found := read(record)) is not None), None)
    if messages is None:
        raise ValueError(f"no question and answer under the keys {', '.join(map(str, record)) or '(none)'}")
    for message in messages:
        message["role"] = ROLES.get(str(message["role"]), message["role"])
    check_messages(messages)
    for n, message in enumerate(messages):
        if not message["content"].strip():
            raise ValueError(f"message {n} ({message['role']}) has no text: {message['content']!r}")
        if SURROGATE.search(message["content"]):
            raise ValueError(f"message {n} ({message['role']}) is not UTF-8")
    if messages[-1]["role"] == "user":
        messages.pop()
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("nothing is answered in it")
    return messages


def file_conversations(path: Path, broken: list[BadRecord]) -> Iterator[Messages]:
    """Every conversation in a json, jsonl, csv, tsv or parquet file (plain, .gz or .zst), or in those of a folder.

    What is no conversation is appended to `broken` with its place and the reason. Raises FileNotFoundError, and
    ValueError when there is no such file at `path` or when nothing in one of them is answered.
    """
    files = [file for file in find_files(Path(path)) if format_of(file) != "txt"]
    if not files:
        raise ValueError(f"{path} has no conversations; expected json, jsonl, csv, tsv or parquet, found plain text")
    for file in files:
        n_usable, n_before = 0, len(broken)
        for record in records(file):
            if isinstance(record, BadRecord):
                broken.append(record)
                continue
            try:
                messages = to_messages(record.value)
            except ValueError as error:
                broken.append(bad(record.where, str(error), str(record.value)))
                continue
            n_usable += 1
            yield messages
        if not n_usable:
            first = f"; the first, {broken[n_before].where}: {broken[n_before].reason}" if broken[n_before:] else ""
            raise ValueError(f"{file} has no usable answer in {len(broken) - n_before} records{first}")


@dataclass(frozen=True)
class Samples:
    """Encoded conversations in flat arrays; sample i is `ids[offsets[i] : offsets[i + 1]]`, and so is its mask."""

    ids: np.ndarray
    """(tokens,) int32."""
    mask: np.ndarray
    """(tokens,) bool: this id is to be predicted and trained."""
    offsets: np.ndarray
    """(samples + 1,) uint64."""
    stats: dict[str, int]
    """conversations = samples + dropped + without_target; tokens, targets; cut: samples that lost their tail."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


def encode_samples(
    conversations: Iterable[Messages], template: ChatTemplate, seq_len: int, too_long: str = "cut"
) -> Samples:
    """Encode conversations for rows of `seq_len` positions, which hold samples of up to seq_len + 1 ids.

    `too_long` says what happens to longer ones: "cut" keeps the beginning, without an end token, which would teach
    to stop there; "drop" leaves them out. What has no target (left) is left out, too. `.stats` counts all of it.
    """
    if too_long not in ("cut", "drop"):
        raise ValueError(f"too_long is 'cut' or 'drop', found {too_long!r}")
    ids, mask, offsets = array("i"), bytearray(), array("Q", [0])
    stats = dict.fromkeys(("conversations", "samples", "tokens", "targets", "cut", "dropped", "without_target"), 0)
    for messages in conversations:
        sample, trained = template.encode(messages)
        stats["conversations"] += 1
        is_long = len(sample) > seq_len + 1
        if is_long and too_long == "drop":
            stats["dropped"] += 1
            continue
        n_targets = sum(trained[1 : seq_len + 1])  # nothing precedes the first id: it cannot be predicted
        if not n_targets:
            stats["without_target"] += 1
            continue
        ids.extend(sample[: seq_len + 1])
        mask.extend(trained[: seq_len + 1])
        offsets.append(len(ids))
        stats["samples"] += 1
        stats["targets"] += n_targets
        stats["cut"] += is_long
    stats["tokens"] = len(ids)
    return Samples(np.array(ids, np.int32), np.array(mask, bool), np.array(offsets, np.uint64), stats)


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

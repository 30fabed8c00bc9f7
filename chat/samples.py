"""Conversations, or pairs of answers -> (ids, mask) by the chat template -> samples in flat arrays."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from chat.conversations import Messages, PreferencePair, file_conversations, preference_pairs
from chat.template import ChatTemplate
from cli.progress import track
from corpora.registry import BadRecord, stable_share

T = TypeVar("T")
Text = tuple[list[int], list[bool]]  # ids of an encoded conversation, and which of them are to be predicted


@dataclass(frozen=True)
class Samples:
    """Encoded conversations in flat arrays; sample i is `ids[offsets[i] : offsets[i + 1]]`, and so is its mask."""

    ids: np.ndarray
    """(tokens,) int32"""
    mask: np.ndarray
    """(tokens,) bool: True where the id is predicted and trained"""
    offsets: np.ndarray
    """(samples + 1,) uint64"""
    stats: dict[str, int]
    """tokens, targets, and numbers of records, see `encode_samples` and `encode_pairs`"""
    enough: int = 0
    """positions of a row that would hold nine in ten of the records whole"""

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Kind(NamedTuple):
    """What differs between records of one text (conversations) and of two (pairs)."""

    records: str  # plural; the key of their number in `Samples.stats`
    kept: str  # key of the number of records that become samples
    useless: str  # key of the number of records that teach nothing
    is_useless: Callable[[list[Text]], bool]
    none_fits: str  # error messages
    all_useless: str


CONVERSATIONS = Kind(
    records="conversations",
    kept="samples",
    useless="without_target",
    is_useless=lambda texts: not any(texts[0][1][1:]),  # the first id cannot be predicted: nothing precedes it
    none_fits="no conversation has an answer",
    all_useless='no conversation has an answer that is trained: they are marked "loss": false',
)
PAIRS = Kind(
    records="pairs",
    kept="kept",
    useless="alike",
    is_useless=lambda texts: texts[0][0] == texts[1][0],
    none_fits="no pair has two different answers",
    all_useless="the template makes the two answers of every pair the same",
)


def encode_samples(
    records: Iterable[Messages], template: ChatTemplate, seq_len: int, too_long: str = "cut", train_on: str = "all"
) -> Samples:
    """Encode conversations for rows of `seq_len` positions, which hold samples of up to seq_len + 1 ids.

    `too_long`: "cut" keeps the beginning of longer samples, without an end token, which would teach to stop there;
    "drop" leaves them out. `train_on`: "all" answers of a conversation, or the "last" one. `.stats` counts
    conversations = samples + dropped + beyond (all targets lie beyond the cut) + without_target; cut: samples that lost
    their tail; turns: answers in all conversations.
    """
    if train_on not in ("all", "last"):
        raise ValueError(f"train_on is 'all' or 'last', found {train_on!r}")
    turns = 0

    def texts() -> Iterator[list[Text]]:
        nonlocal turns
        for messages in records:
            turns += sum(message["role"] == "assistant" for message in messages)
            yield [encode(messages if train_on == "all" else only_last(messages), template)]

    samples = _collect(texts(), CONVERSATIONS, seq_len, too_long)
    samples.stats["turns"] = turns
    return samples


def encode_pairs(
    records: Iterable[PreferencePair], template: ChatTemplate, seq_len: int, too_long: str = "cut"
) -> Samples:
    """Encode pair i as samples 2i and 2i + 1: the conversations with the chosen and with the rejected answer, of up to
    seq_len + 1 ids each. The last answer of each is trained.

    `too_long`: "cut" keeps the beginning of longer texts, "drop" leaves out pairs with one. `.stats` counts pairs =
    kept + dropped + beyond (an answer, or all that differs between the two, lies beyond the cut) + alike (the template
    makes the answers the same); cut: pairs that lost the tail of a text.
    """
    texts = ([encode(only_last(messages), template) for messages in pair.conversations()] for pair in records)
    return _collect(texts, PAIRS, seq_len, too_long)


def _collect(records: Iterable[list[Text]], kind: Kind, seq_len: int, too_long: str) -> Samples:
    """Return the samples of those records that fit and have something to learn; a record is one text, or two."""
    if too_long not in ("cut", "drop"):
        raise ValueError(f"too_long is 'cut' or 'drop', found {too_long!r}")
    ids, mask, offsets, lengths = array("i"), bytearray(), array("Q", [0]), array("I")
    names = (kind.records, kind.kept, "tokens", "targets", "cut", "dropped", "beyond", kind.useless)
    stats = dict.fromkeys(names, 0)
    for texts in records:
        stats[kind.records] += 1
        lengths.append(max(len(text) for text, _ in texts))
        is_long = lengths[-1] > seq_len + 1
        kept = [(text[: seq_len + 1], trained[: seq_len + 1]) for text, trained in texts]
        targets = [sum(trained[1:]) for _, trained in kept]
        # The test runs on the whole record first, because longer rows would help only those that fail it after the cut.
        if kind.is_useless(texts):
            fate = kind.useless
        elif is_long and too_long == "drop":
            fate = "dropped"
        elif not all(targets) or kind.is_useless(kept):
            fate = "beyond"
        else:
            fate = kind.kept
            for text, trained in kept:
                ids.extend(text)
                mask.extend(trained)
                offsets.append(len(ids))
            stats["targets"] += sum(targets)
            stats["cut"] += is_long
        stats[fate] += 1
    stats["tokens"] = len(ids)
    enough = max(0, math.ceil(np.percentile(lengths, 90)) - 1) if lengths else 0  # n ids take n - 1 positions
    return Samples(np.array(ids, np.int32), np.array(mask, bool), np.array(offsets, np.uint64), stats, enough)


def encode(messages: Messages, template: ChatTemplate) -> Text:
    """Return `(ids, mask)` of a conversation, or of a text without roles, which is trained from bos to eos."""
    if messages[0]["role"] != "text":
        return template.encode(messages)
    tokenizer = template.tokenizer
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    before, after = ([] if i is None else [i] for i in (start, tokenizer.eos_id))
    text = tokenizer.encode(messages[0]["content"], follows_special=bool(before)) + after
    return before + text, [False] * len(before) + [True] * len(text)


def only_last(messages: Messages) -> Messages:
    """Return the conversation with all its answers but the last marked as not trained."""
    before = [message | {"loss": False} if message["role"] == "assistant" else message for message in messages[:-1]]
    return [*before, messages[-1]]


def read_samples(
    path: Path,
    template: ChatTemplate,
    seq_len: int,
    too_long: str = "cut",
    train_on: str = "all",
    broken: list[BadRecord] | None = None,
    share: float = 0.0,
    aside: list[Messages] | None = None,
) -> Samples:
    """Read and encode the conversations at `path`; append records that cannot be read to `broken`.

    The `share` of the conversations that `set_aside` holds out is not encoded but appended to `aside`. Raises
    ValueError when no sample is left to train.
    """
    conversations = file_conversations(path, [] if broken is None else broken, template.check)
    kept = set_aside(conversations, lambda messages: messages, share, [] if aside is None else aside)
    encoder = partial(encode_samples, template=template, seq_len=seq_len, too_long=too_long, train_on=train_on)
    return _encode_file(path, kept, encoder, CONVERSATIONS, seq_len, share)


def read_pairs(
    path: Path,
    template: ChatTemplate,
    seq_len: int,
    too_long: str = "cut",
    broken: list[BadRecord] | None = None,
    share: float = 0.0,
    aside: list[PreferencePair] | None = None,
) -> Samples:
    """Read and encode the pairs at `path`, as `read_samples` does conversations."""
    pairs = preference_pairs(path, [] if broken is None else broken, template.check)
    kept = set_aside(pairs, lambda pair: pair.prompt, share, [] if aside is None else aside)
    encoder = partial(encode_pairs, template=template, seq_len=seq_len, too_long=too_long)
    return _encode_file(path, kept, encoder, PAIRS, seq_len, share)


def set_aside(items: Iterable[T], turns: Callable[[T], Messages], share: float, aside: list[T]) -> Iterator[T]:
    """Yield all items but a `share` of them, which is appended to `aside`.

    The hash of the first question in an item's `turns` decides: equally on every machine, and for all items with that
    question.
    """
    for item in items:
        question = next(message["content"] for message in turns(item) if message["role"] != "system")
        if stable_share(question) < share:
            aside.append(item)
        else:
            yield item


def _encode_file(
    path: Path, records: Iterable[T], encoder: Callable[[Iterable[T]], Samples], kind: Kind, seq_len: int, share: float
) -> Samples:
    """Encode the records of a file with a progress bar; raise ValueError with the reason when no sample results."""
    first = os.environ.get("RANK", "0") == "0"  # one of several processes shows the progress
    samples = encoder(track(records, f"encoding {path.name}", kind.records, active=first))
    if len(samples):
        return samples
    if samples.stats[kind.useless] < samples.stats[kind.records]:
        raise ValueError(f"{path}: {kind.none_fits} within {seq_len} tokens; raise --data.seq_len")
    if samples.stats[kind.records]:
        raise ValueError(f"{path}: {kind.all_useless}")
    raise ValueError(
        f"{path}: a share of {share} holds out all there is; lower --data.heldout_share, or 0 for no evaluation"
    )

"""Conversations, or pairs of answers -> (ids, mask) by the chat template -> samples in flat arrays."""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chat.conversations import Messages, PreferencePair, read_files, to_messages, to_pair
from chat.features import WORDS
from chat.template import ChatTemplate
from cli.progress import track
from corpora.registry import BadRecord, stable_share

Text = tuple[list[int], list[bool]]  # ids of an encoded conversation, and which of them are to be predicted


@dataclass(frozen=True)
class Samples:
    """Encoded conversations in flat arrays; sample i is `ids[offsets[i] : offsets[i + 1]]`, and so is its mask."""

    ids: np.ndarray  # (tokens,) int32
    mask: np.ndarray  # (tokens,) bool: True where the id is predicted and trained
    offsets: np.ndarray  # (samples + 1,) uint64
    stats: dict[str, int]  # tokens, targets, and numbers of records, see `encode_samples`
    enough: int = 0  # positions of a row that would hold nine in ten of the records whole

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Record(NamedTuple):
    """An encoded conversation, or an encoded pair."""

    question: str  # its hash decides whether the record is held out
    texts: list[Text]  # one of a conversation; of a pair that with the chosen and that with the rejected answer
    turns: int  # answers in a conversation


def encode_conversation(messages: Messages, template: ChatTemplate, train_on: str) -> Record:
    """Encode a conversation, or a text without roles, which is trained to its eos."""
    turns = sum(message["role"] == "assistant" for message in messages)
    if messages[0]["role"] != "text":
        text = template.encode(messages if train_on == "all" else only_last(messages))
        return Record(question(messages), [text], turns)
    tokenizer = template.tokenizer
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    before = tokenizer.begins or after  # without bos, a text follows the eos of another, as in token bins
    text = tokenizer.encode(messages[0]["content"]) + after
    return Record(question(messages), [(before + text, [False] * len(before) + [True] * len(text))], turns)


def encode_pair(pair: PreferencePair, template: ChatTemplate, train_on: str) -> Record:
    """Encode both conversations of a pair; the last answer of each is trained, whatever `train_on` says."""
    texts = [template.encode(only_last(messages)) for messages in pair.conversations()]
    return Record(question(pair.prompt), texts, turns=1)


def only_last(messages: Messages) -> Messages:
    """Return the conversation with all its answers but the last marked as not trained."""
    before = [message | {"loss": False} if message["role"] == "assistant" else message for message in messages[:-1]]
    return [*before, messages[-1]]


def question(messages: Messages) -> str:
    """Return the first text that is not the system message."""
    return next(message["content"] for message in messages if message["role"] != "system")


class Kind(NamedTuple):
    """What differs between records of one text (conversations) and of two (pairs)."""

    records: str  # plural; the key of their number in `Samples.stats`
    texts: tuple[str, ...]  # names of the samples of a record
    read: Callable[[Any, set[str]], Any]  # from a record of a file; what of it is left out is added to the set
    encode: Callable[[Any, ChatTemplate, str], Record]
    kept: str  # key of the number of records that become samples
    useless: str  # key of the number of records that teach nothing
    is_useless: Callable[[list[Text]], bool]
    usable: str  # error messages
    none_fits: str
    all_useless: str


CONVERSATIONS = Kind(
    records="conversations",
    texts=("",),
    read=to_messages,
    encode=encode_conversation,
    kept="samples",
    useless="without_target",
    is_useless=lambda texts: not any(texts[0][1][1:]),  # the first id cannot be predicted: nothing precedes it
    usable="usable answer",
    none_fits="no conversation has an answer",
    all_useless='no conversation has an answer that is trained: they are marked "loss": false',
)
PAIRS = Kind(
    records="pairs",
    texts=("chosen", "rejected"),
    read=to_pair,
    encode=encode_pair,
    kept="kept",
    useless="alike",
    is_useless=lambda texts: texts[0][0] == texts[1][0],
    usable="pair of answers",
    none_fits="no pair has two different answers",
    all_useless="the template makes the two answers of every pair the same",
)


def encode_samples(
    records: Iterable[Messages] | Iterable[PreferencePair],
    template: ChatTemplate,
    seq_len: int,
    too_long: str = "cut",
    train_on: str = "all",
    kind: Kind = CONVERSATIONS,
) -> Samples:
    """Encode records for rows of `seq_len` positions, which hold samples of up to seq_len + 1 ids; pair i becomes the
    samples 2i (chosen) and 2i + 1 (rejected). `train_on`: "all" answers of a conversation, or the "last" one.

    `too_long`: "cut" keeps the beginning of longer samples, without an end token, which would teach to stop there;
    "drop" leaves out their records. `.stats` counts records = kept (conversations: samples) + dropped + beyond (all
    targets, or all that differs between two answers, lie beyond the cut) + those that teach nothing: without_target,
    or alike where the template makes both answers the same; cut: records that lost a tail; turns: answers.
    """
    if train_on not in ("all", "last"):
        raise ValueError(f"train_on is 'all' or 'last', found {train_on!r}")
    return collect((kind.encode(record, template, train_on) for record in records), kind, seq_len, too_long)


def collect(records: Iterable[Record], kind: Kind, seq_len: int, too_long: str) -> Samples:
    """Return the samples of all records but those that teach nothing, cut or dropped as `encode_samples` says."""
    if too_long not in ("cut", "drop"):
        raise ValueError(f"too_long is 'cut' or 'drop', found {too_long!r}")
    ids, mask, offsets, lengths = array("i"), bytearray(), array("Q", [0]), array("I")
    names = [kind.records, kind.kept, "tokens", "targets", "cut", "dropped", "beyond", kind.useless]
    stats = dict.fromkeys(names + ["turns"] * (kind is CONVERSATIONS), 0)
    for _, texts, turns in records:
        if kind is CONVERSATIONS:
            stats["turns"] += turns
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


def read_samples(
    path: Path,
    template: ChatTemplate,
    seq_len: int,
    too_long: str = "cut",
    train_on: str = "all",
    kind: Kind = CONVERSATIONS,
    broken: list[BadRecord] | None = None,
    share: float = 0.0,
    aside: list[Record] | None = None,
    left_out: Counter[str] | None = None,
) -> Samples:
    """Read and encode the records at `path`, see `encode_samples`; append those that cannot be read to `broken`.

    left_out: counts the other records of which something is not used, by what that is: "`id`, which is not used"

    The `share` of the records that `set_aside` holds out is appended to `aside`. Raises ValueError when no sample is
    left to train.
    """

    def read(record: Any) -> Record:
        parts: set[str] = set()
        value = kind.read(record, parts)
        encoded = kind.encode(value, template, train_on)
        if left_out is not None:
            conversations = value.conversations() if isinstance(value, PreferencePair) else (value,)
            unrendered = {part for messages in conversations for part in template.leaves_out(messages)}
            words = (WORDS.get(part, f"`{part}`") for part in unrendered)
            left_out.update(parts.union(f"{each}, which the template does not render" for each in words))
        return encoded

    records = read_files(path, [] if broken is None else broken, read, kind.usable)
    kept = set_aside(records, share, [] if aside is None else aside)
    first = os.environ.get("RANK", "0") == "0"  # one of several processes shows the progress
    samples = collect(track(kept, f"encoding {path.name}", kind.records, active=first), kind, seq_len, too_long)
    if len(samples):
        return samples
    if samples.stats[kind.useless] < samples.stats[kind.records]:
        raise ValueError(
            f"{path}: {kind.none_fits} within {seq_len} tokens; --data.seq_len {samples.enough} would keep 90 % of "
            "them whole (a model of a shorter context is extended by pretrain.py --init_from DIR --model.max_seq_len "
            f"{samples.enough})"
        )
    if samples.stats[kind.records]:
        raise ValueError(f"{path}: {kind.all_useless}")
    raise ValueError(
        f"{path}: --data.heldout_share {share} holds out every record; lower it, or set it to 0 for no evaluation"
    )


def set_aside(records: Iterable[Record], share: float, aside: list[Record]) -> Iterator[Record]:
    """Yield all records but a `share` of them, which is appended to `aside`.

    The hash of the question decides: equally on every machine, and for all records with that question.
    """
    for record in records:
        if stable_share(record.question) < share:
            aside.append(record)
        else:
            yield record

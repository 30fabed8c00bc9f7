"""Conversations -> (ids, mask) by the chat template -> samples: what is trained is what the template's mask says.

To see what a file becomes:

python dataset_sft.py --data FILE --model DIR --show 3
"""

from __future__ import annotations

import math
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from chat.conversations import Messages, file_conversations
from chat.template import ChatTemplate, load_template
from cli.args import parse, run
from cli.progress import track
from corpora.registry import BadRecord, stable_share
from tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")


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
    """conversations = samples + dropped + beyond + without_target, see `encode_samples`; tokens, targets; cut: samples
    that lost their tail; turns: answers in all conversations. Of pairs: those of `encode_pairs`, where cut counts pairs
    that lost the tail of a text."""
    enough: int = 0
    """positions of a row that would hold nine in ten of the records whole"""

    def __len__(self) -> int:
        return len(self.offsets) - 1


def encode_samples(
    conversations: Iterable[Messages],
    template: ChatTemplate,
    seq_len: int,
    too_long: str = "cut",
    train_on: str = "all",
) -> Samples:
    """Encode conversations for rows of `seq_len` positions, which hold samples of up to seq_len + 1 ids.

    `too_long` says what happens to longer ones: "cut" keeps the beginning, without an end token, which would teach
    to stop there; "drop" leaves them out. What has no target is left out, too, and so is what has none left, since all
    of them lie beyond the cut. `.stats` counts them apart: dropped, without_target, beyond.
    `train_on`: "all" answers of a conversation, or the "last" one.
    """
    if too_long not in ("cut", "drop"):
        raise ValueError(f"too_long is 'cut' or 'drop', found {too_long!r}")
    if train_on not in ("all", "last"):
        raise ValueError(f"train_on is 'all' or 'last', found {train_on!r}")
    ids, mask, offsets = array("i"), bytearray(), array("Q", [0])
    names = ("conversations", "samples", "tokens", "targets", "cut", "dropped", "beyond", "without_target", "turns")
    stats = dict.fromkeys(names, 0)
    lengths = array("I")
    for messages in conversations:
        sample, trained = encode(messages if train_on == "all" else only_last(messages), template)
        lengths.append(len(sample))
        stats["conversations"] += 1
        stats["turns"] += sum(message["role"] == "assistant" for message in messages)
        is_long = len(sample) > seq_len + 1
        n_targets = sum(trained[1 : seq_len + 1])  # nothing precedes the first id: it cannot be predicted
        if not any(trained[1:]):
            stats["without_target"] += 1
        elif is_long and too_long == "drop":
            stats["dropped"] += 1
        elif not n_targets:
            stats["beyond"] += 1
        else:
            ids.extend(sample[: seq_len + 1])
            mask.extend(trained[: seq_len + 1])
            offsets.append(len(ids))
            stats["samples"] += 1
            stats["targets"] += n_targets
            stats["cut"] += is_long
    stats["tokens"] = len(ids)
    flat = np.array(ids, np.int32), np.array(mask, bool), np.array(offsets, np.uint64)
    return Samples(*flat, stats, nine_in_ten(lengths))


def nine_in_ten(lengths: array) -> int:
    """Positions of a row that holds nine in ten of the samples of these lengths."""
    return max(0, math.ceil(np.percentile(lengths, 90)) - 1) if lengths else 0


def encode(messages: Messages, template: ChatTemplate) -> tuple[list[int], list[bool]]:
    """`(ids, mask)` of a conversation, or of a text without roles: that begins after bos and is trained to its eos."""
    if messages[0]["role"] != "text":
        return template.encode(messages)
    tokenizer = template.tokenizer
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    ends = [[i] if i is not None else [] for i in (start, tokenizer.eos_id)]
    text = tokenizer.encode(messages[0]["content"], follows_special=bool(ends[0]))
    return ends[0] + text + ends[1], [False] * len(ends[0]) + [True] * (len(text) + len(ends[1]))


def only_last(messages: Messages) -> Messages:
    """The conversation with all its answers but the last marked as no targets."""
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
    """The conversations at `path`, encoded; the records that are none go to `broken`, with their places.

    The `share` of them that `set_aside` holds out is not encoded and goes to `aside`. Raises ValueError when nothing is
    left to train.
    """
    conversations = file_conversations(path, [] if broken is None else broken, template.check)
    kept = set_aside(conversations, lambda messages: messages, share, [] if aside is None else aside)
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one shows the progress
    kept = track(kept, f"encoding {path.name}", "conversations", active=first)
    samples = encode_samples(kept, template, seq_len, too_long, train_on)
    if not len(samples):
        if samples.stats["without_target"] < samples.stats["conversations"]:
            raise ValueError(f"{path}: no conversation has an answer within {seq_len} tokens; raise --data.seq_len")
        if samples.stats["conversations"]:
            raise ValueError(f'{path}: no conversation has an answer that is trained: they are marked "loss": false')
        raise ValueError(all_held_out(path, share))
    return samples


def set_aside(items: Iterable[T], turns: Callable[[T], Messages], share: float, aside: list[T]) -> Iterator[T]:
    """All items but the `share` of them, by the hash of the first question in their `turns`, that goes to `aside`: the
    same on every machine, and all that begin with one question."""
    for item in items:
        question = next(message["content"] for message in turns(item) if message["role"] != "system")
        if stable_share(question) < share:
            aside.append(item)
        else:
            yield item


def all_held_out(path: Path, share: float) -> str:
    """Why a split leaves nothing to train."""
    return f"{path}: a share of {share} holds out all there is; lower --data.heldout_share, or 0 for no evaluation"


# --- to look at samples -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Show what is trained of a file of conversations: samples, their targets marked, and what there is of them."""

    data: Path = Path("data/tiny/sft_train.jsonl")
    """conversations in any form, see conversations.py"""
    model: Path = Path("out/tiny/pretrain/best")
    """a model directory, or the file of a tokenizer"""
    template: str = "auto"
    """auto (the model's own, else ours), own, ours, plain, chatml, llama2, mftcoder, or the path of a .jinja file"""
    seq_len: int = 128
    """tokens in a row of a batch"""
    too_long: Literal["cut", "drop"] = "cut"
    """what happens to a sample that does not fit a row"""
    train_on: Literal["all", "last"] = "all"
    """the answers of a conversation that are trained"""
    show: int = 3
    """samples to print"""


def main(args: Args) -> dict[str, Any]:
    """Print samples and statistics; returns these."""
    template = load_template(load_tokenizer(args.model), args.template)
    broken: list[BadRecord] = []
    samples = read_samples(args.data, template, args.seq_len, args.too_long, args.train_on, broken)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for n in range(min(args.show, len(samples))):
        here = np.s_[int(samples.offsets[n]) : int(samples.offsets[n + 1])]
        print(f"--- sample {n + 1}: {here.stop - here.start} tokens, {samples.mask[here].sum()} of them targets")
        print(marked(template.tokenizer, samples.ids[here], samples.mask[here], colour))
    found = statistics(samples) | {"broken": len(broken), "template": template.name}
    print("---", *(f"{name}: {value}" for name, value in found.items()), sep="\n")
    for record in broken[:3]:
        print(f"broken: {record.where}: {record.reason}")
    return found


def marked(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray, colour: bool) -> str:
    """The text of a sample with what is trained in green, or, without colour, in double brackets."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("\u27e6", "\u27e7")
    names = {i: piece.encode() for piece, i in tokenizer.special.items()}
    parts = []
    for trained, stretch in groupby(zip(ids.tolist(), mask.tolist()), key=lambda pair: pair[1]):
        text = b"".join(names.get(i) or tokenizer.id_to_bytes(i) for i, _ in stretch).decode("utf8", errors="replace")
        parts.append(f"{begin}{text}{end}" if trained else text)
    return "".join(parts)


def statistics(samples: Samples) -> dict[str, Any]:
    """Of all samples: the counts, the share of targets, and how long they are."""
    lengths = np.diff(samples.offsets.astype(np.int64))
    at = (0, 10, 50, 90, 99, 100)
    spread = ", ".join(f"{p}% {int(n)}" for p, n in zip(at, np.percentile(lengths, at)))
    share = samples.stats["targets"] / samples.stats["tokens"]
    return samples.stats | {"share of targets": f"{share:.1%}", "tokens a sample (percentiles)": spread}


if __name__ == "__main__":
    run(main, parse(Args, "dataset_sft"))

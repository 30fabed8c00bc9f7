"""Pairs of answers -> samples -> batches, for preference tuning: both answers of a pair are in one row."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from chat.conversations import PreferencePair, preference_pairs
from chat.samples import Samples, all_held_out, encode, nine_in_ten, only_last, set_aside
from chat.template import ChatTemplate
from cli.progress import track
from corpora.registry import BadRecord


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

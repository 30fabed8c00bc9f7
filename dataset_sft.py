"""Conversations -> (ids, mask) by the chat template -> samples: what is trained is what the template's mask says."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from chat_template import ChatTemplate
from conversations import Messages


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

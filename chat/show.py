"""Samples in a form for readers: their text with the targets marked, and their statistics."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np

from chat.samples import Samples
from tokenizer import Tokenizer


def marked(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray, colour: bool) -> str:
    """Return the text of a sample with its targets in green or, without colour, in double brackets."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("\u27e6", "\u27e7")
    names = {i: piece.encode() for piece, i in tokenizer.special.items()}
    parts = []
    for trained, stretch in groupby(zip(ids.tolist(), mask.tolist()), key=lambda pair: pair[1]):
        text = b"".join(names.get(i) or tokenizer.id_to_bytes(i) for i, _ in stretch).decode("utf8", errors="replace")
        parts.append(f"{begin}{text}{end}" if trained else text)
    return "".join(parts)


def statistics(samples: Samples) -> dict[str, Any]:
    """Return the counts, the share of targets, and percentiles of the lengths."""
    lengths = np.diff(samples.offsets.astype(np.int64))
    at = (0, 10, 50, 90, 99, 100)
    spread = ", ".join(f"{p}% {int(n)}" for p, n in zip(at, np.percentile(lengths, at)))
    share = samples.stats["targets"] / samples.stats["tokens"]
    return samples.stats | {"share of targets": f"{share:.1%}", "tokens a sample (percentiles)": spread}

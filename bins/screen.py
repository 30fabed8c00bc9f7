"""Screen a stream of documents: drop short ones and exact duplicates, and choose the held-out ones."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from corpora import BadRecord, Document

BATCH_CHARS, BATCH_ITEMS = 1 << 18, 1024  # a batch ends at the first of these limits


@dataclass
class ScreenedBatch:
    """Consecutive items of the stream after screening."""

    end: int
    """Number of items of the stream up to the end of this batch."""
    documents: list[Document] = field(default_factory=list)
    """Documents to keep; their `held_out` is True or False, never None."""
    written: bool = False
    """Whether an interrupted run has written its documents; they are read again only to know them."""
    bad: list[BadRecord] = field(default_factory=list)
    """Records that could not be read."""
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """Documents per source: dropped ones by reason (too_short, too_long, duplicate), and what `count` adds."""

    def count(self, source: str, **numbers: int) -> None:
        """Add each keyword argument to the count of that name for `source`, as in count("a.txt", duplicate=1)."""
        self.counts.setdefault(source, Counter()).update(numbers)

    def texts(self) -> list[str]:
        """Return the texts of the documents."""
        return [document.text for document in self.documents]


def screen(
    items: Iterable[Document | BadRecord], *, min_chars: int, held_out: float, deduplicate: bool, max_chars: int = 0
) -> Iterator[ScreenedBatch]:
    """Yield the stream in batches, without documents that are short, long, duplicates, or not Unicode.

    min_chars, max_chars: documents with fewer or more characters, without the white space around them, are dropped.
        max_chars 0: none is too long.
    held_out: share of the documents to hold out, chosen by the SHA-256 of the text, where the corpus does not decide.

    The ends of batches depend on the stream alone, so that reading it again yields the same batches.
    """
    seen, end = SeenDigests(), 0
    for group in groups(items):
        end += len(group)
        batch, candidates, digests = ScreenedBatch(end), [], []
        for item in group:
            if isinstance(item, BadRecord):
                batch.bad.append(item)
            elif len(item.text.strip()) < max(min_chars, 1):
                batch.count(item.source, too_short=1)
            elif 0 < max_chars < len(item.text.strip()):
                batch.count(item.source, too_long=1)
            else:
                try:
                    digests.append(hashlib.sha256(item.text.encode("utf8")).digest())
                    candidates.append(item)
                except UnicodeEncodeError as error:  # half a surrogate pair: JSON can write it, UTF-8 cannot
                    raw = ascii(item.text[max(error.start - 20, 0) : error.start + 20])
                    batch.bad.append(BadRecord(item.source, f"not Unicode at character {error.start + 1}", raw))
        new = seen.add([digest[:16] for digest in digests]) if deduplicate else [True] * len(digests)
        for document, digest, is_new in zip(candidates, digests, new):
            if not is_new:
                batch.count(document.source, duplicate=1)
            elif document.held_out is None:
                share = int.from_bytes(digest[:8], "big") / 2**64  # in [0, 1), the same on every machine
                batch.documents.append(replace(document, held_out=share < held_out))
            else:
                batch.documents.append(document)
        yield batch


def groups(items: Iterable[Document | BadRecord]) -> Iterator[list[Document | BadRecord]]:
    """Yield the stream in lists; a list ends when it has BATCH_CHARS characters or BATCH_ITEMS items."""
    group, chars = [], 0
    for item in items:
        group.append(item)
        chars += len(item.text if isinstance(item, Document) else item.raw)
        if chars >= BATCH_CHARS or len(group) == BATCH_ITEMS:
            yield group
            group, chars = [], 0
    if group:
        yield group


class SeenDigests:
    """A set of 16-byte digests that needs 16 bytes each; a Python set needs more than 100.

    It keeps sorted arrays ("runs"), each at least twice as long as the next one, as in a log-structured merge tree.
    Memory doubles briefly while two runs are merged. The probability that two different texts among n have the same
    digest is about n^2 / 2^129.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []  # each sorted, dtype S16, which numpy compares byte by byte

    def add(self, digests: list[bytes]) -> np.ndarray:
        """Add digests to the set; returns (len(digests),) bool, True at the first occurrence of a new digest."""
        # S16 drops zero bytes at the end, in the set and in the query alike, so that comparisons stay exact.
        unique, first = np.unique(np.array(digests, "S16"), return_index=True)
        fresh = ~self.has(unique)
        if fresh.any():
            self.runs.append(unique[fresh])
        # Merge runs of similar length, so that there are only O(log n) of them.
        while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
            merged = np.concatenate([self.runs.pop(), self.runs.pop()])
            merged.sort(kind="stable")
            self.runs.append(merged)
        new = np.zeros(len(digests), bool)  # back to the order of `digests`
        new[first[fresh]] = True
        return new

    def has(self, digests: np.ndarray) -> np.ndarray:
        """Return whether each of the digests, (n,) S16, is in the set, (n,) bool."""
        found = np.zeros(len(digests), bool)
        for run in self.runs:  # binary search of all digests in each run
            at = np.searchsorted(run, digests)
            found |= run[np.minimum(at, len(run) - 1)] == digests
        return found

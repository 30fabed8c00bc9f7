"""From a corpus' stream of documents to ids, in order: screening, exact duplicates, tokenizing in several processes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from corpora import BadRecord, Document

BATCH_CHARS, BATCH_ITEMS = 1 << 18, 1024  # a batch ends where either is reached


@dataclass
class Batch:
    """A stretch of the stream: the documents to keep, the bad records, and counts per source of the rest."""

    end: int
    """Items of the stream up to the end of this batch."""
    documents: list[Document] = field(default_factory=list)
    """`held_out` is decided: True or False."""
    bad: list[BadRecord] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """Per source, what was dropped: too_short, duplicate."""

    def count(self, source: str, **found: int) -> None:
        self.counts.setdefault(source, Counter()).update(found)

    def texts(self) -> list[str]:
        return [document.text for document in self.documents]


def screen(
    items: Iterable[Document | BadRecord], *, min_chars: int, held_out: float, deduplicate: bool
) -> Iterator[Batch]:
    """The stream in batches, without what is shorter than `min_chars`, seen before or not Unicode.

    A document that leaves it open is held out when the SHA-256 of its text falls into the share `held_out`.
    Where a batch ends depends on the stream alone, so reading it again gives the same batches.
    """
    seen, end = SeenDigests(), 0
    for group in groups(items):
        end += len(group)
        batch, candidates, digests = Batch(end), [], []
        for item in group:
            if isinstance(item, BadRecord):
                batch.bad.append(item)
            elif len(item.text.strip()) < max(min_chars, 1):
                batch.count(item.source, too_short=1)
            else:
                try:
                    digests.append(hashlib.sha256(item.text.encode("utf8")).digest())
                    candidates.append(item)
                except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
                    raw = ascii(item.text[max(error.start - 20, 0) : error.start + 20])
                    batch.bad.append(BadRecord(item.source, f"not Unicode at character {error.start + 1}", raw))
        new = seen.add([digest[:16] for digest in digests]) if deduplicate else [True] * len(digests)
        for document, digest, is_new in zip(candidates, digests, new):
            if not is_new:
                batch.count(document.source, duplicate=1)
            elif document.held_out is None:
                share = int.from_bytes(digest[:8], "big") / 2**64
                batch.documents.append(replace(document, held_out=share < held_out))
            else:
                batch.documents.append(document)
        yield batch


def groups(items: Iterable[Document | BadRecord]) -> Iterator[list[Document | BadRecord]]:
    """Cut a stream where BATCH_CHARS characters or BATCH_ITEMS items are reached."""
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
    """A set of 16-byte digests in 16 bytes each, where Python's own takes over a hundred.

    Sorted runs of falling length, merged when they grow alike, as in a log-structured merge tree; twice as much while
    two runs merge. Among n texts, two different ones are taken for the same with odds n^2 / 2^129.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []  # each sorted, dtype S16: compared byte by byte

    def add(self, digests: list[bytes]) -> np.ndarray:
        """(len(digests),) bool: True where a digest was never seen, in earlier calls or earlier in this one."""
        unique, first = np.unique(np.array(digests, "S16"), return_index=True)
        fresh = np.ones(len(unique), bool)
        for run in self.runs:
            at = np.searchsorted(run, unique)
            fresh &= run[np.minimum(at, len(run) - 1)] != unique
        if fresh.any():
            self.runs.append(unique[fresh])
        while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
            merged = np.concatenate([self.runs.pop(), self.runs.pop()])
            merged.sort(kind="stable")
            self.runs.append(merged)
        new = np.zeros(len(digests), bool)
        new[first[fresh]] = True
        return new

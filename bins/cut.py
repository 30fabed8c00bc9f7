"""Cut a stream of token ids into documents, for files that hold ids and no index of documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

MOST = 1 << 27  # ids of one document, which is held in memory


def cut(blocks: Iterable[np.ndarray], separator: int, where: object, before: bool = False) -> Iterator[np.ndarray]:
    """Yield the documents of a stream of ids; what stands outside of two separators is a document, too.

    separator: id that each document ends with, or begins with where `before`; where: file, for the error
    Raises ValueError where more than MOST ids have no separator among them.
    """
    rest: list[np.ndarray] = []
    for block in blocks:
        start = 0
        for at in np.flatnonzero(block == separator).tolist():
            end = at if before else at + 1
            document = np.concatenate([*rest, block[start:end]])
            if document.size:
                yield document
            rest, start = [], end
        rest.append(np.array(block[start:]))  # a copy, so that the block itself can be given back
        if sum(part.size for part in rest) > MOST:
            raise ValueError(
                f"{where} has more than {MOST:,} ids without the id {separator} that should part its documents: it was "
                "made with another tokenizer, or has another separator; see --separator"
            )
    if sum(part.size for part in rest):
        yield np.concatenate(rest)


def without_fill(documents: Iterable[np.ndarray], fill: int) -> Iterator[np.ndarray]:
    """Yield documents without those at the end that are nothing but `fill`: they fill the last file."""
    waiting = 0
    for document in documents:
        if document.size == 1 and document[0] == fill:
            waiting += 1
            continue
        yield from itertools.repeat(np.full(1, fill), waiting)
        waiting = 0
        yield document


def in_blocks(ids: np.ndarray, size: int = 1 << 22) -> Iterator[np.ndarray]:
    """Yield a mapped array in parts of `size` values."""
    for start in range(0, len(ids), size):
        yield np.asarray(ids[start : start + size])

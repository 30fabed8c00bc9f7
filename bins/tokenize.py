"""Filter and tokenize documents in several processes and return them in order."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from operator import not_
from typing import NamedTuple

import numpy as np

from bins.filters import Filters, NearDuplicates, drop
from bins.screen import ScreenedBatch
from cli.parent import end_with_parent
from tokenizer import Tokenizer

NO_FILTERS = Filters()


class Encoded(NamedTuple):
    """What a worker returns for the texts of a batch: one array for all, which is sent much faster than many."""

    ids: np.ndarray
    """(n,) uint32, the ids of all texts that were kept; none where the batch is written already"""
    ends: np.ndarray
    """(kept texts,) int64, the end of each"""
    kept: list[bool]
    """for each text, whether it is in one of the languages"""
    bands: np.ndarray
    """(kept texts, bands) S16, see Filters.bands"""


def tokenize(
    batches: Iterable[ScreenedBatch], tokenizer: Tokenizer, processes: int, filters: Filters = NO_FILTERS
) -> Iterator[tuple[ScreenedBatch, list[np.ndarray]]]:
    """Yield each batch, without the documents that the filters drop, with the ids of its documents: uint32 arrays that
    begin and end as `encode` says. Batches that are written already come without documents.

    The order is that of `batches` for any number of processes. At most two batches per process wait in memory.
    Raises OSError when a process dies.
    """
    near = NearDuplicates()
    for batch, found in encoded(batches, tokenizer, processes, filters):
        for document in drop(batch.documents, map(not_, found.kept)):
            batch.count(document.source, other_language=1)
        documents, fresh = drop(batch.documents, found.kept), near.fresh(found.bands)
        for document in drop(documents, map(not_, fresh)):
            batch.count(document.source, near_duplicate=1)
        if batch.written:
            continue
        batch.documents = drop(documents, fresh)
        yield batch, drop(split(found.ids, found.ends), fresh)


def encoded(
    batches: Iterable[ScreenedBatch], tokenizer: Tokenizer, processes: int, filters: Filters
) -> Iterator[tuple[ScreenedBatch, Encoded]]:
    """Yield each batch with what `encode` returns for its texts."""
    if processes == 1:
        for batch in batches:
            yield batch, encode(tokenizer, batch.texts(), filters, batch.written)
        return
    # Spawn, not fork: a forked process copies locks that other threads hold at that moment, and may wait forever.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, initializer=start_worker, initargs=(tokenizer, filters))
    pending: deque[tuple[ScreenedBatch, Future]] = deque()
    try:
        for batch in batches:
            pending.append((batch, submit(pool, batch.texts(), batch.written)))
            if len(pending) > 2 * processes:
                yield take(pending)
        while pending:
            yield take(pending)
    except BrokenProcessPool as error:
        raise OSError(
            "a tokenizing process died, perhaps because memory ran out; repeat the command with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def submit(pool: ProcessPoolExecutor, texts: list[str], written: bool) -> Future:
    """Send texts to the pool, with SIGINT blocked in a worker that starts now.

    Processes inherit the signal mask, so that Ctrl-C never reaches a worker, only the main process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(encode_in_worker, texts, written)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def take(pending: deque[tuple[ScreenedBatch, Future]]) -> tuple[ScreenedBatch, Encoded]:
    """Wait for the oldest batch and return it with what was found for its documents."""
    batch, future = pending.popleft()
    return batch, future.result()


def encode(tokenizer: Tokenizer, texts: list[str], filters: Filters = NO_FILTERS, written: bool = False) -> Encoded:
    """Filter and encode texts; those of a batch that is `written` already are not encoded.

    Each text has before it what the tokenizer puts there (bos, or nothing), and eos at its end.
    """
    kept = filters.kept(texts)
    texts = drop(texts, kept)
    begins, eos = (np.array(ids, np.uint32) for ids in (tokenizer.begins, [tokenizer.eos_id]))
    documents = [] if written else tokenizer.encode_all(texts)
    ends = np.cumsum([len(begins) + len(ids) + 1 for ids in documents], dtype=np.int64)
    parts = [begins[:0], *(part for ids in documents for part in (begins, ids, eos))]
    return Encoded(np.concatenate(parts).astype(np.uint32), ends, kept, filters.bands(texts))


def split(ids: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Return one view of `ids` per document."""
    return np.split(ids, ends[:-1]) if len(ends) else []


def start_worker(tokenizer: Tokenizer, filters: Filters) -> None:
    """Store what is sent once per process, and end this process when the main process ends or dies."""
    global _tokenizer, _filters
    end_with_parent(multiprocessing.parent_process().pid)
    _tokenizer, _filters = tokenizer, filters


def encode_in_worker(texts: list[str], written: bool) -> Encoded:
    """Call `encode` with the tokenizer and the filters of this process."""
    return encode(_tokenizer, texts, _filters, written)

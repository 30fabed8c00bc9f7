"""Tokenize documents in several processes and return them in order."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain

import numpy as np

from bins.screen import ScreenedBatch
from cli.parent import end_with_parent
from tokenizer import Tokenizer


def tokenize(
    batches: Iterator[ScreenedBatch], tokenizer: Tokenizer, processes: int
) -> Iterator[tuple[ScreenedBatch, list[np.ndarray]]]:
    """Yield each batch with the ids of its documents, uint32 arrays that begin and end as `encode` says.

    The order is that of `batches` for any number of processes. At most two batches per process wait in memory.
    Raises OSError when a process dies.
    """
    if processes == 1:
        for batch in batches:
            yield batch, split(*encode(tokenizer, batch.texts()))
        return
    # Spawn, not fork: a forked process copies locks that other threads hold at that moment, and may wait forever.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, initializer=start_worker, initargs=(tokenizer,))
    pending: deque[tuple[ScreenedBatch, Future]] = deque()
    try:
        for batch in batches:
            pending.append((batch, submit(pool, batch.texts())))
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


def submit(pool: ProcessPoolExecutor, texts: list[str]) -> Future:
    """Send texts to the pool, with SIGINT blocked in a worker that starts now.

    Processes inherit the signal mask, so that Ctrl-C never reaches a worker, only the main process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(encode_in_worker, texts)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def take(pending: deque[tuple[ScreenedBatch, Future]]) -> tuple[ScreenedBatch, list[np.ndarray]]:
    """Wait for the oldest batch and return it with the ids of its documents."""
    batch, future = pending.popleft()
    return batch, split(*future.result())


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all texts, (n,) uint32, and the end of each, (len(texts),) int64.

    Each text has before it what the tokenizer puts there (bos, or nothing), and eos at its end.
    """
    documents = [[*tokenizer.begins, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
    return np.fromiter(chain.from_iterable(documents), np.uint32), ends


def split(ids: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Return one view of `ids` per document; sending one array between processes is much faster than sending many."""
    return np.split(ids, ends[:-1]) if len(ends) else []


def start_worker(tokenizer: Tokenizer) -> None:
    """Store the tokenizer, which is sent once per process, and end this process when the main process ends or dies."""
    global _tokenizer
    end_with_parent(multiprocessing.parent_process().pid)
    _tokenizer = tokenizer


def encode_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Call `encode` with the tokenizer of this process."""
    return encode(_tokenizer, texts)

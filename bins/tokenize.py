"""Documents tokenized by several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain

import numpy as np

from bins.screen import Batch
from tokenizer import Tokenizer


def tokenize(
    batches: Iterator[Batch], tokenizer: Tokenizer, processes: int
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Each batch with the ids of its documents, uint32, eos at their ends; in order, for any number of processes.

    Bounded: at most two batches a process wait. Raises OSError when a process dies.
    """
    if processes == 1:
        for batch in batches:
            yield batch, split(*encode(tokenizer, batch.texts()))
        return
    # Spawned, not forked: a fork copies the threads' locks of this process as they happen to stand.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, initializer=start_worker, initargs=(tokenizer,))
    pending: deque[tuple[Batch, Future]] = deque()
    try:
        for batch in batches:
            pending.append((batch, submit(pool, batch.texts())))
            if len(pending) > 2 * processes:
                yield take(pending)
        while pending:
            yield take(pending)
    except BrokenProcessPool as error:
        raise OSError(
            "a tokenizing process died, perhaps for lack of memory: run again with fewer processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def submit(pool: ProcessPoolExecutor, texts: list[str]) -> Future:
    """Ctrl-C is for the main process: one that starts here inherits, from its first instant, that it is blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(encode_in_worker, texts)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def take(pending: deque[tuple[Batch, Future]]) -> tuple[Batch, list[np.ndarray]]:
    batch, future = pending.popleft()
    return batch, split(*future.result())


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts, each followed by eos, (n,) uint32, and where each text ends, (len(texts),) int64."""
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
    return np.fromiter(chain.from_iterable(documents), np.uint32), ends


def split(ids: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Views of `ids`, one a document: one array crosses between processes far faster than a thousand."""
    return np.split(ids, ends[:-1]) if len(ends) else []


def start_worker(tokenizer: Tokenizer) -> None:
    """Keep the tokenizer, sent once a process, and see to it that the process ends with the main one, even killed."""
    global _tokenizer
    threading.Thread(target=end_with_parent, daemon=True).start()
    _tokenizer = tokenizer


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return encode(_tokenizer, texts)

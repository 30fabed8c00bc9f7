"""Notice that another process of a run has ended or hangs, and say which one.

A thread of every rank writes a sign of life to the store that the launcher keeps, and reads those of the others. A
process that waits for another one in gloo or nccl knows only that a message is missing, not whose.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

SECONDS = 0.5  # between two signs of life
SILENT = 5.0  # seconds without a sign of life after which a rank has ended, where a connection is lost
END = "watch/end"  # key in the store: all ranks shall end
WORDS = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "connection refused", "remote error")


def lost_connection(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, says that another process is gone."""
    if error is None:
        return False
    texts = [str(error).lower(), type(error).__name__.lower()]
    here = isinstance(error, RuntimeError) and any(word in text for text in texts for word in WORDS)
    return here or lost_connection(error.__cause__)


class Watch:
    """The signs of life of the ranks of one run.

    A sign is "beat calls where": a count that the thread raises, the number of exchanges that the main thread has
    begun, and host and process. A rank hangs when the others have waited `limit` seconds for an exchange that it has
    not begun.
    """

    def __init__(self, rank: int, world: int, limit: float) -> None:
        self.rank, self.world, self.limit = rank, world, limit
        self.calls, self.since = 0, None  # exchanges begun; when the present one began to wait
        self.seen: dict[int, tuple[str, float]] = {}  # rank -> last sign, and when it was first read
        self.ended = threading.Event()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
        self.where = f"process {os.getpid()} on {socket.gethostname()}"
        self.lost_store = self.explaining = False
        threading.Thread(target=self._run, daemon=True).start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count an exchange, and the time that the main thread waits in it."""
        self.calls += 1
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def stop(self) -> None:
        """End the thread."""
        self.ended.set()

    def explain(self) -> None:
        """End this process with a sentence that names the rank that has ended; return where all ranks live."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would come before the sentence
        self.explaining = True
        until = time.monotonic() + SILENT + 4 * SECONDS
        while time.monotonic() < until and not self.ended.is_set():
            if self.lost_store and self.rank != 0:
                self._end("rank 0 has ended, and with it the store of the launcher")
            now = time.monotonic()
            silent = [rank for rank, (_, at) in self.seen.items() if rank != self.rank and now - at > SILENT]
            if silent:
                self._end(f"{self._name(silent[0])} has ended", first=min(set(range(self.world)) - set(silent)))
            time.sleep(SECONDS)

    def _run(self) -> None:
        beat = 0
        while not self.ended.wait(SECONDS):
            beat += 1
            try:
                self.store.set(f"watch/{self.rank}", f"{beat} {self.calls} {self.where}")
                if self.store.check([END]):  # another rank has said why; this one may be the one that hangs
                    os._exit(1)
                if self.explaining or self._waited() > SILENT:  # not always: every rank would read those of all others
                    self._read()
            except Exception:  # the store has ended with the launcher, or with rank 0
                self.lost_store = True
                return
            if self._waited() > self.limit:
                behind = [rank for rank in self.seen if self._calls(rank) < self.calls]
                if behind:
                    what = f"{self._name(behind[0])} hangs: the others have waited {self.limit:g} s for it"
                    self._end(f"{what} (--train.rank_timeout)", first=min(set(self.seen) - set(behind)))

    def _read(self) -> None:
        """Read the signs of all ranks, and note when each was new."""
        for rank in range(self.world):
            sign = self.store.get(f"watch/{rank}").decode() if self.store.check([f"watch/{rank}"]) else ""
            if sign and self.seen.get(rank, ("", 0.0))[0] != sign:
                self.seen[rank] = sign, time.monotonic()

    def _waited(self) -> float:
        """Return how long the main thread has waited in its present exchange, in seconds."""
        since = self.since
        return 0.0 if since is None else time.monotonic() - since

    def _calls(self, rank: int) -> int:
        return int(self.seen[rank][0].split()[1])

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self.seen[rank][0].split(' ', 2)[2]})"

    def _end(self, what: str, first: int | None = None) -> None:
        """End this process at once; the rank `first` (None: every one) says why."""
        if first in (None, self.rank):
            sys.stderr.write(f"error: {what}; the same command goes on from the newest checkpoint\n")
            sys.stderr.flush()
            with contextlib.suppress(Exception):  # the store may have ended
                self.store.set(END, "")
        else:
            time.sleep(4 * SECONDS)  # so that the rank that speaks is not ended by the launcher before
        os._exit(1)

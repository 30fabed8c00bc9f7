"""The engine of a server: one thread that owns the model, and decodes the texts of all requests together."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from cli.progress import say
from decoding.fixed_rows import Adjust, FixedRows
from decoding.params import NEVER, Ids, SamplingParams, Stop
from decoding.rows import Token


class BusyError(Exception):
    """The queue is full; `retry_after` is the number of seconds after which there may be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False)
class Job:
    """One text to decode. The engine fills the last fields, and sets `changed` when there is something to tell."""

    prompt: list[int]
    params: SamplingParams
    stop: Stop = NEVER
    top: int | None = None
    echo: bool = False
    adjust: Adjust | None = None
    streams: bool = False
    """tell every token; False: only the end"""
    deadline: float = math.inf
    """latest end of the job, by time.monotonic()"""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """jobs of one request may share it"""
    tokens: list[Token] = field(default_factory=list)
    """as in `Grown`: after the tokens of the prompt where these are echoed"""
    ended: str | None = None
    error: Exception | None = None
    cached: int = 0
    """ids of the prompt that did not have to be read"""
    failed: Exception | None = None
    """what went wrong in `adjust`"""
    gone: bool = False
    """nobody waits for it any more"""
    times: dict[str, float] = field(default_factory=lambda: {"came": time.monotonic()})
    """when the job came, was begun, had its first token and ended, by time.monotonic()"""

    @property
    def over(self) -> bool:
        return self.ended is not None or self.error is not None


class Engine:
    """Decode jobs in a thread of its own. A job that comes while all rows are taken waits in a queue, first in, first
    out. `alive` tells whether the thread runs."""

    def __init__(self, rows: FixedRows, most_waiting: int) -> None:
        self.rows, self.most_waiting = rows, most_waiting
        self.alive = False
        self._waiting: deque[Job] = deque()
        self._lasted: deque[float] = deque(maxlen=64)  # seconds that each of the last jobs took, once begun
        self._running: dict[int, Job] = {}
        self._closing = False
        self._wake = threading.Condition()
        self._checked = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; `loop` is where the events of the jobs are set."""
        self._loop, self.alive = loop, True
        self._thread.start()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Put the jobs of one request into the queue. Raises BusyError where `most_waiting` wait for a row already."""
        with self._wake:
            if not self.alive:
                raise RuntimeError("the engine has ended")
            if self._closing or len(self._waiting) >= self.most_waiting + self.rows.n - len(self._running):
                raise BusyError(self._retry_after())
            self._waiting.extend(jobs)
            self._wake.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Forget jobs: those that wait at once, those that run before the next step."""
        with self._wake:
            for job in jobs:
                job.gone = True
                if job in self._waiting:
                    self._waiting.remove(job)

    def close(self) -> None:
        """Finish all jobs, then end the thread; new jobs are refused."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _retry_after(self) -> int:
        """Return the seconds until a job that waits has begun, as far as the last jobs tell."""
        mean = sum(self._lasted) / len(self._lasted) if self._lasted else 1.0
        return max(1, math.ceil(mean * len(self._waiting) / self.rows.n))

    def _run(self) -> None:
        try:
            while self._next():
                try:
                    grown = self.rows.step()
                except Exception as error:  # the jobs fail and not the server
                    traceback.print_exc()
                    say(f"a step failed ({error}): its {len(self._running)} texts are given up")
                    self._notify([self._end(key, error=error) for key in list(self._running)])
                    continue
                self._tell(grown)
        finally:
            with self._wake:
                self.alive, left = False, [*self._waiting, *self._running.values()]
            for job in left:  # only after a mistake in this class
                self._finish(job, error=RuntimeError("the engine has ended"))
            self._notify(left)

    def _next(self) -> bool:
        """Wait for something to do; False when there is nothing left to do and never will be."""
        with self._wake:
            while not (self._waiting or self._running or self._closing):
                self._wake.wait()
            self._drop()
            while self._waiting and self.rows.free:
                self._begin(self._waiting.popleft())
            return bool(self._waiting or self._running) or not self._closing

    def _begin(self, job: Job) -> None:
        adjust = job.adjust and self._guarded(job, job.adjust)
        options = {"stop": job.stop, "top": job.top, "echo": job.echo, "adjust": adjust}
        job.times["begun"] = time.monotonic()
        try:
            key, job.cached = self.rows.add(job.prompt, job.params, **options)
        except ValueError as error:
            self._notify([self._finish(job, error=error)])
        else:
            self._running[key] = job

    @staticmethod
    def _guarded(job: Job, adjust: Adjust) -> Adjust:
        """Return `adjust` so that an error in it ends this job and no other."""

        def guarded(logits: torch.Tensor, answer: Ids) -> torch.Tensor:
            try:
                return adjust(logits, answer)
            except Exception as error:
                job.failed = error
                return logits

        return guarded

    def _drop(self) -> None:
        """Let jobs go that nobody waits for, and a few times a second those whose time is over."""
        for key in [key for key, job in self._running.items() if job.gone]:
            self.rows.remove(key)
            self._running.pop(key)
        if (now := time.monotonic()) < self._checked + 0.1:
            return
        self._checked = now
        late = [job for job in self._waiting if now > job.deadline]
        for job in late:
            self._waiting.remove(job)
            self._finish(job, error=TimeoutError("the time for this request was over before its turn came"))
        for key in [key for key, job in self._running.items() if now > job.deadline]:
            late.append(self._end(key, error=TimeoutError("the time for this request was over before its end")))
        self._notify(late)

    def _tell(self, grown: list) -> None:
        """Give the jobs their new tokens."""
        now, changed = time.monotonic(), []
        for key, tokens, ended in grown:
            job = self._running[key]
            job.tokens += tokens
            if "first" not in job.times and len(job.tokens) > len(job.prompt) * job.echo:
                job.times["first"] = now
            if ended or job.failed:
                self._end(key, None if job.failed else ended, job.failed)
            if job.over or (job.streams and tokens):
                changed.append(job)
        self._notify(changed)

    def _end(self, key: int, ended: str | None = None, error: Exception | None = None) -> Job:
        """Let a running job leave; return it."""
        self.rows.remove(key)
        return self._finish(self._running.pop(key), ended, error)

    def _finish(self, job: Job, ended: str | None = None, error: Exception | None = None) -> Job:
        job.times["ended"] = time.monotonic()
        self._lasted.append(job.times["ended"] - job.times.get("begun", job.times["came"]))
        job.ended, job.error = ended, error
        return job

    def _notify(self, jobs: list[Job]) -> None:
        """Set the events of jobs, in the thread of the loop, in one go."""
        events = {job.changed for job in jobs}
        if events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: [event.set() for event in events])

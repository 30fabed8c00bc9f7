"""How many threads a step of decoding takes: all, or one, whichever was faster of late.

The threads of a step wait for each other some dozen times. Where other programs use the same cores, one of them does
not run while the others wait, and a step may take ten times as long as with one thread. So steps are timed, and the
slower way is tried again now and then, as the other programs may have ended. The results are the same, bit for bit,
with the compiled step (cpu_step.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

PATIENCE = 50  # the slower way is tried again when this many times its seconds have passed: 2 % of the time at most
NEWEST = 0.2  # weight of the last step in the mean


class Threads:
    """The choice for one loop of steps. Steps of like sizes are compared: twice as many ids make another size."""

    def __init__(self, most: int | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        """most: threads that there are (default: torch's number)."""
        self.ways = tuple(dict.fromkeys((most or torch.get_num_threads(), 1)))
        self._clock = clock
        self._seconds: dict[tuple[int, int], float] = {}  # (size, threads) -> mean of the last steps
        self._since: dict[int, float] = {}  # size -> seconds of the faster way since the slower was tried

    def choose(self, size: int) -> int:
        """Return the number of threads for a step of a size."""
        for threads in self.ways:
            if (size, threads) not in self._seconds:
                return threads
        fast, slow = sorted(self.ways, key=lambda threads: self._seconds[size, threads])
        return slow if self._since.get(size, 0.0) > PATIENCE * self._seconds[size, slow] else fast

    def took(self, size: int, threads: int, seconds: float) -> None:
        """Note how long a step took."""
        if (size, threads) not in self._seconds:
            self._seconds[size, threads] = seconds
            return
        slowest = max(self._seconds.get((size, way), 0.0) for way in self.ways)
        is_slow = self._seconds[size, threads] == slowest
        self._since[size] = 0.0 if is_slow else self._since.get(size, 0.0) + seconds
        self._seconds[size, threads] += NEWEST * (seconds - self._seconds[size, threads])

    @contextlib.contextmanager
    def step(self, n_ids: int) -> Iterator[None]:
        """Run a step that feeds so many ids with the threads that suit it."""
        if len(self.ways) == 1:
            yield
            return
        size = n_ids.bit_length()
        threads = self.choose(size)
        torch.set_num_threads(threads)
        start = self._clock()
        try:
            yield
            self.took(size, threads, self._clock() - start)
        finally:
            torch.set_num_threads(self.ways[0])

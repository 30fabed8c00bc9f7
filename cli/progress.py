"""Show the progress of long work on stderr: a bar on a terminal, a line from time to time in a log or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
PLAIN_LINE_SECONDS = 10.0
LEAST_SHARE = 0.01  # of the work that has to be done before the rest is estimated


class Bar(tqdm):
    """A bar that shows a remaining time only once there is something to estimate it from."""

    @staticmethod
    def format_meter(n: float, total: float | None, elapsed: float, **options: object) -> str:
        """Return the text of the bar."""
        early = total and options.get("bar_format") is None and n - options.get("initial", 0) < LEAST_SHARE * total
        return tqdm.format_meter(n, total, elapsed, **options | ({"bar_format": EARLY} if early else {}))


EARLY = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Progress:
    """A progress bar with the rate and, if the total is known, the remaining time.

        with Progress("reading", "B", total=size) as bar:
            for text in texts:
                bar.add(len(text))

    what: name of the work in a word or two
    unit: name of the counted things, such as "documents", or "B" for bytes
    total: their number, which may be an estimate
    done: number of those that an earlier run completed; they do not count for the rate
    active: False shows nothing (in all processes of a run but one)
    note_only: on a terminal show the count and the note of `show`, which has its own rate and time
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        done: int = 0,
        active: bool = True,
        note_only: bool = False,
    ) -> None:
        self.what, self.unit, self.total, self.done, self.active = what, unit, total, done, active
        self.bar = Bar(
            desc=what,
            unit="B" if unit == "B" else f" {unit}",
            total=total,
            initial=done,
            unit_scale=unit == "B",
            leave=False,
            bar_format="{desc}: {n_fmt}/{total_fmt}{postfix}" if note_only else None,
            disable=None if active else True,  # None: a bar on a terminal only
        )
        self._began = self._last_line = time.monotonic()
        self._first = self._at_last_line = done
        self._rate: float | None = None  # at the last line

    def add(self, amount: int = 1) -> None:
        """Count `amount` more as done; cheap enough to be called for every document."""
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        if self.bar.disable and self.active and now - self._last_line > PLAIN_LINE_SECONDS:
            say(self._line(now))

    def show(self, done: int, note: str) -> None:
        """Set the number of things done and show it at once, followed by `note`."""
        self.done = self.bar.n = done
        if not self.bar.disable:
            self.bar.set_postfix_str(note)
        elif self.active:
            say(f"{self.unit} {done}/{self.total} {note}")

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self.bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, now: float) -> str:
        """Return a line such as `reading: 12.3MB of 98.7MB, 1.20MB/s, 01:12 left`, without the unknown parts.

        The rate is the mean of that since the last line and of the one before, so that a slow start is soon forgotten.
        """
        recent = (self.done - self._at_last_line) / max(now - self._last_line, 1e-9)
        rate = recent if not self._rate else (recent + self._rate) / 2
        self._rate, self._last_line, self._at_last_line = rate, now, self.done
        if self.unit == "B":
            done, total, speed = (f"{tqdm.format_sizeof(n)}B" for n in (self.done, self.total or 0, rate))
            name = ""
        else:
            done, total, speed = f"{self.done:,}", f"{self.total or 0:,}", f"{rate:,.1f}"
            name = f" {self.unit}"
        if self.total is None or self.done > self.total:  # the total was an estimate, and too low
            return f"{self.what}: {done}{name}, {speed}/s"
        line = f"{self.what}: {done} of {total}{name}"
        if self.done - self._first < LEAST_SHARE * self.total:  # the first documents may have waited for a download
            return line
        left = f", {tqdm.format_interval((self.total - self.done) / rate)} left" if rate else ""
        return f"{line}, {speed}/s{left}"


def track(items: Iterable[T], what: str, unit: str, total: int | None = None, active: bool = True) -> Iterator[T]:
    """Yield the items and show progress; an item counts as done when the caller takes the next one."""
    with Progress(what, unit, total, active=active) as bar:
        for item in items:
            yield item
            bar.add()


def say(text: str) -> None:
    """Print a line on stderr, above the progress bars."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()

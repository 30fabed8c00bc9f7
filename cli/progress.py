"""Show the progress of long work on stderr: a bar on a terminal, a line from time to time in a log or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
PLAIN_LINE_SECONDS = 10.0


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
        self.bar = tqdm(
            desc=what,
            unit="B" if unit == "B" else f" {unit}",
            total=total,
            initial=done,
            unit_scale=unit == "B",
            leave=False,
            bar_format="{desc}: {n_fmt}/{total_fmt}{postfix}" if note_only else None,
            disable=None if active else True,  # None: a bar on a terminal only
        )
        self._before, self._began = done, time.monotonic()
        self._last_line = self._began

    def add(self, amount: int = 1) -> None:
        """Count `amount` more as done; cheap enough to be called for every document."""
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        if self.bar.disable and self.active and now - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = now
            say(self._line(now - self._began))

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

    def _line(self, seconds: float) -> str:
        """Return a line such as `reading: 12.3MB of 98.7MB, 1.20MB/s, 01:12 left`, without the unknown parts."""
        if self.unit == "B":
            done, total, name = tqdm.format_sizeof(self.done), tqdm.format_sizeof(self.total or 0), "B"
        else:
            done, total, name = f"{self.done:,}", f"{self.total or 0:,}", f" {self.unit}"
        rate = (self.done - self._before) / max(seconds, 1e-9)
        speed = f"{tqdm.format_sizeof(rate)}B/s" if name == "B" else f"{rate:,.1f}/s"
        if self.total is None or self.done > self.total:  # the total was an estimate, and too low
            return f"{self.what}: {done}{name}, {speed}"
        left = f", {tqdm.format_interval((self.total - self.done) / rate)} left" if rate else ""
        return f"{self.what}: {done} of {total}{name}, {speed}{left}"


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

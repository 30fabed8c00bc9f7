"""Progress of long work, on stderr: a bar on a terminal; elsewhere (a log, a pipe) a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
PLAIN_LINE_SECONDS = 10.0


class Progress:
    """How far some work is, with its rate and, where the total is known, the time left.

        with Progress("reading", "B", total=size) as shown:
            for text in texts:
                shown.add(len(text))

    what: the work, in a word or two; unit: what is counted, such as "documents", or "B" for bytes; total: how many
    there are, perhaps roughly; done: how many were done in an earlier run, which do not count for the rate;
    active: False shows nothing (for all processes of a run but one).
    """

    def __init__(self, what: str, unit: str, total: int | None = None, done: int = 0, active: bool = True) -> None:
        self.what, self.unit, self.total, self.done, self.active = what, unit, total, done, active
        self.bar = tqdm(
            desc=what,
            unit="B" if unit == "B" else f" {unit}",
            total=total,
            initial=done,
            unit_scale=unit == "B",
            leave=False,
            disable=None if active else True,  # None: shown on a terminal only
        )
        self._before, self._began = done, time.monotonic()
        self._told = self._began

    def add(self, amount: int = 1) -> None:
        """So much more is done; cheap enough for every document."""
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        if self.bar.disable and self.active and now - self._told > PLAIN_LINE_SECONDS:
            self._told = now
            say(self._line(now - self._began))

    def show(self, done: int, note: str) -> None:
        """So much is done in all: shown at once, with a note of the caller's in place of the plain line's rate."""
        self.done = self.bar.n = done
        if not self.bar.disable:
            self.bar.set_postfix_str(note)
        elif self.active:
            say(f"{self.unit} {done}/{self.total} {note}")

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, seconds: float) -> str:
        """`reading: 12.3MB of 98.7MB, 1.20MB/s, 01:12 left`, without what is not known."""
        if self.unit == "B":
            done, total, name = tqdm.format_sizeof(self.done), tqdm.format_sizeof(self.total or 0), "B"
        else:
            done, total, name = f"{self.done:,}", f"{self.total or 0:,}", f" {self.unit}"
        rate = (self.done - self._before) / max(seconds, 1e-9)
        speed = f"{tqdm.format_sizeof(rate)}B/s" if name == "B" else f"{rate:,.1f}/s"
        if self.total is None or self.done > self.total:  # a total that was only guessed
            return f"{self.what}: {done}{name}, {speed}"
        left = f", {tqdm.format_interval((self.total - self.done) / rate)} left" if rate else ""
        return f"{self.what}: {done} of {total}{name}, {speed}{left}"


def track(items: Iterable[T], what: str, unit: str, total: int | None = None, active: bool = True) -> Iterator[T]:
    """The items, with progress: each is done when the next one is asked for."""
    with Progress(what, unit, total, active=active) as shown:
        for item in items:
            yield item
            shown.add()


def say(text: str) -> None:
    """One line on stderr, above the bars if there are any."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()

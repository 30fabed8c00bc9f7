"""Processes of this project's scripts, forked from one that has loaded the libraries: a start takes milliseconds.

The process that forks must not have computed with torch before: threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

SECONDS = 300  # after that a process counts as hung


@dataclass
class Ended:
    """How a process ended: its exit status (negative: the signal that ended it), what it said, how long it took, and
    the most memory that it held at once, in bytes."""

    status: int
    said: str
    seconds: float
    peak: int

    @property
    def traceback(self) -> bool:
        """Whether it showed an error of a program in place of a sentence, or ended by a fault of memory."""
        return "Traceback (most recent call last)" in self.said or self.status in (-signal.SIGSEGV, -signal.SIGBUS)


class Child:
    """A call of `function` in a process of its own, with its output in the file `log`."""

    def __init__(self, function: Callable[[], None], log: Path) -> None:
        self.log, self.began = log, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _call(function, log)
        self.status: int | None = None
        self.peak = 0

    def poll(self) -> bool:
        """Return whether the process has ended."""
        if self.status is None:
            pid, code, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.status, self.peak = os.waitstatus_to_exitcode(code), usage.ru_maxrss * 1024
        return self.status is not None

    def send(self, number: int) -> bool:
        """Send a signal; return whether the process was there to receive it."""
        if alive := not self.poll():
            os.kill(self.pid, number)
        return alive

    def finish(self) -> Ended:
        """Wait for the end of the process."""
        while not self.poll():
            if time.monotonic() - self.began > SECONDS:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for each in psutil.Process(self.pid).children(recursive=True):
                        each.kill()
                self.send(signal.SIGKILL)
            time.sleep(0.002)
        text = self.log.read_text(encoding="utf8", errors="replace")
        return Ended(self.status, text, time.monotonic() - self.began, self.peak)


def _call(function: Callable[[], None], log: Path) -> NoReturn:
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # pytest has its own
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")  # as Python opens it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        function()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def script(command: str, folder: Path, log: Path, before: Callable[[], None] | None = None) -> Child:
    """Start `SCRIPT FLAGS...` in `folder`, as `python SCRIPT.py` does it; `before` is called first, in the child."""

    def main() -> None:
        from cli.args import parse, run

        name, *words = command.split()
        sys.argv = [f"{name}.py", *words]
        os.chdir(folder)
        if before is not None:
            before()
        module = importlib.import_module(name)
        main, cls = module.COMMANDS[words.pop(0)] if name == "convert" else (module.main, module.Args)
        run(main, parse(cls, name, words))

    return Child(main, log)

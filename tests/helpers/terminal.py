"""A terminal in which a program runs: keys go in, and a screen shows what a person would see (pyte)."""

import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path

import pyte


class Terminal:
    """A program in a terminal of its own, which ends with the block."""

    def __init__(self, command: list[str], columns: int = 80, lines: int = 24, **environment: str) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.screen.write_process_input = self.type  # where a program asks for the place of the cursor
        self.stream = pyte.ByteStream(self.screen)
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.chdir(Path(__file__).parents[2])
            ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
            os.execve(
                command[0], command, os.environ | {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""} | environment
            )

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.child:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        os.close(self.terminal)

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    @property
    def text(self) -> str:
        """What is on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    @property
    def cursor(self) -> int:
        """The column of the cursor."""
        return self.screen.cursor.x

    def clear(self) -> None:
        self.screen.erase_in_display(2)

    def wait_for(self, wanted: str | Callable[[], bool], seconds: float = 60) -> None:
        """Wait until a text is on the screen, or something is so."""
        deadline = time.monotonic() + seconds
        while not (wanted() if callable(wanted) else wanted in self.text):
            ready, _, _ = select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited for {wanted!r}, saw\n{self.text}"
            try:
                self.stream.feed(os.read(self.terminal, 1000))
            except OSError as error:  # the program has ended
                raise AssertionError(f"waited for {wanted!r}, saw\n{self.text}") from error

    def wait_for_answer(self, answer: str) -> None:
        """Wait for an answer and the next prompt: what is typed before it is not edited."""
        self.wait_for(answer)
        self.wait_for(lambda: self.text.rstrip().endswith("\n>") and self.cursor == 2)

    def status(self) -> int:
        """Wait for the end; return the exit status."""
        child, self.child = self.child, 0
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

"""The elements of a JSON array of any size, one at a time, without ever holding the array.

A window slides over the text; `json`'s own decoder reads one element from it, and the window grows only when an
element does not end inside it. A malformed element is reported and skipped up to where the next one seems to begin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

CHUNK = 1 << 20
MAX_CHARS = 1 << 24
"""Longest record read, in characters, here and in the line formats: what bounds the memory."""

_DECODER = json.JSONDecoder()
# Where the next element begins after a malformed one, by the first character of the malformed one.
_BOUNDARY = {
    "{": re.compile(r"\}\s*,\s*(?=\{)"),
    "[": re.compile(r"\]\s*,\s*(?=\[)"),
    '"': re.compile(r'"\s*,\s*(?=")'),
}
_COMMA = re.compile(",")
_NOT_SPACE = re.compile(r"\S")


@dataclass(frozen=True)
class Malformed:
    """What stands where an element should; `raw` is how it begins."""

    reason: str
    raw: str


class _Window:
    """`text[at:]` is read from the file but not consumed; `line` is the line of `at`, counted from 1."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at, self.line = file, "", 0, 1

    def grow(self) -> bool:
        """Drop what is consumed and read at least as much as is left, so that a long element costs linear time."""
        self.text = self.text[self.at :]
        self.at = 0
        more = self.file.read(max(CHUNK, len(self.text)))
        self.text += more
        return bool(more)

    def consume(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def peek(self) -> str:
        """The next character that is not white space, not consumed; empty at the end of the file."""
        while not (match := _NOT_SPACE.search(self.text, self.at)):
            self.consume(len(self.text))
            if not self.grow():
                return ""
        self.consume(match.start())
        return match.group()

    def decode(self) -> Any:
        """The element that begins at `at`, or a Malformed."""
        while True:
            length = len(self.text) - self.at
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                pos, message = getattr(error, "pos", self.at), str(error)
                # An element cut by the edge of the window fails there, or at the start of its open string.
                cut = pos > len(self.text) - 12 or message.startswith("Unterminated string")
                if cut and length <= MAX_CHARS and self.grow():
                    continue
                if cut and length > MAX_CHARS:
                    return self.skip(f"longer than {MAX_CHARS} characters", pos)
                return self.skip(f"not JSON: {message}", pos)
            # `1` before the edge may be the beginning of `12`, and `1e+` that of `1e+5`.
            size = end - self.at
            if end + 3 <= len(self.text) or not self.grow():
                self.consume(self.at + size)
                return value

    def skip(self, reason: str, pos: int) -> Malformed:
        """Consume up to where the next element seems to begin at or after `pos`, or the whole file."""
        malformed = Malformed(reason, self.text[self.at : self.at + CHUNK])
        boundary = _BOUNDARY.get(self.text[self.at], _COMMA)
        pos = max(pos, self.at)
        while not (match := boundary.search(self.text, pos)):
            # The boundary itself may lie across the edge of the window.
            self.consume(max(self.at, len(self.text) - 64))
            if not self.grow():
                self.consume(len(self.text))
                return malformed
            pos = self.at
        self.consume(match.end())
        return malformed


def elements(file: TextIO) -> Iterator[tuple[int, Any]]:
    """`(line, element)` for each element of the array that `file` begins with; a Malformed stands for a bad one.

    Nothing is lost in silence: text behind the closing bracket and a missing bracket are Malformed too.
    """
    window = _Window(file)
    if window.peek() != "[":
        raise ValueError("expected a JSON array")
    window.consume(window.at + 1)
    closed = False
    while char := window.peek():
        line = window.line
        if closed:
            yield line, window.skip("text after the end of the array", window.at)
            closed = window.peek() == ""
        elif char in ",]":
            window.consume(window.at + 1)
            closed = char == "]"
        else:
            yield line, window.decode()
    if not closed:
        yield window.line, Malformed("the file ends before its array is closed", "")

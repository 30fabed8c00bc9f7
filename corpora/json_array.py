"""Read the elements of a JSON array of any size, or JSON values one after the other, one at a time in bounded memory.

A window slides over the text and Python's JSON decoder reads one element from it; the window grows only when an element
does not end inside it. A malformed element is reported, and reading continues where the next one seems to begin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

CHUNK = 1 << 20
MAX_CHARS = 1 << 24
"""Maximum length of a record in characters, also in the formats with one record per line; it limits the memory."""

_DECODER = json.JSONDecoder()
# Where the next element begins after a malformed one, by the first character of the malformed one.
_BOUNDARY = {
    "{": re.compile(r"\}\s*,\s*(?=\{)"),
    "[": re.compile(r"\]\s*,\s*(?=\[)"),
    '"': re.compile(r'"\s*,\s*(?=")'),
}
_COMMA = re.compile(",")
_AT_LINE = re.compile(r"\n(?=\{)")  # where the next value begins that follows without a comma
_NOT_SPACE = re.compile(r"\S")


@dataclass(frozen=True)
class Malformed:
    """Text in the place of an element that is not valid JSON; `raw` is its beginning."""

    reason: str
    raw: str


class _Window:
    """A window over the text of a file.

    `text[at:]` is read from the file but not consumed yet; `line` is the line number at `at`, counted from 1.
    """

    def __init__(self, file: TextIO, boundary: re.Pattern[str] | None = None) -> None:
        """boundary: where the next value begins after a malformed one; None: by the malformed one, see _BOUNDARY."""
        self.file, self.text, self.at, self.line, self.boundary = file, "", 0, 1, boundary

    def grow(self) -> bool:
        """Drop the consumed text and read more; returns False at the end of the file.

        The window at least doubles, so that a long element, decoded again after each growth, costs linear time.
        """
        self.text = self.text[self.at :]
        self.at = 0
        more = self.file.read(max(CHUNK, len(self.text)))
        self.text += more
        return bool(more)

    def consume(self, end: int) -> None:
        """Move `at` forward to `end` and count the lines between."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def peek(self) -> str:
        """Return the next character that is not white space without consuming it; "" at the end of the file."""
        while not (match := _NOT_SPACE.search(self.text, self.at)):
            self.consume(len(self.text))
            if not self.grow():
                return ""
        self.consume(match.start())
        return match.group()

    def decode(self) -> Any:
        """Return the element that begins at `at` and consume it, or return a Malformed."""
        while True:
            length = len(self.text) - self.at
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                pos, message = getattr(error, "pos", self.at), str(error)
                # An element cut by the end of the window fails near that end, or at the start of an open string.
                cut = pos > len(self.text) - 12 or message.startswith("Unterminated string")
                if cut and length <= MAX_CHARS and self.grow():
                    continue
                if cut and length > MAX_CHARS:
                    return self.skip(f"longer than {MAX_CHARS} characters", pos)
                return self.skip(f"not JSON: {message}", pos)
            # A number at the end of the window may continue: `1` may be the start of `12`, `1e+` of `1e+5`.
            size = end - self.at
            if end + 3 <= len(self.text) or not self.grow():
                self.consume(self.at + size)
                return value

    def skip(self, reason: str, pos: int) -> Malformed:
        """Consume up to where the next element at or after `pos` seems to begin, else the whole file.

        Returns a Malformed with `reason` and the beginning of the skipped text.
        """
        malformed = Malformed(reason, self.text[self.at : self.at + CHUNK])
        boundary = self.boundary or _BOUNDARY.get(self.text[self.at], _COMMA)
        pos = max(pos, self.at)
        while not (match := boundary.search(self.text, pos)):
            # Keep 64 characters: the boundary itself may lie across the end of the window.
            self.consume(max(self.at, len(self.text) - 64))
            if not self.grow():
                self.consume(len(self.text))
                return malformed
            pos = self.at
        self.consume(match.end())
        return malformed


def spreads(text: str) -> bool:
    """Return whether a text begins with a JSON object that goes over several lines."""
    text = text.lstrip()
    try:
        end = _DECODER.raw_decode(text)[1] if text.startswith("{") else 0
    except (ValueError, RecursionError):  # broken, or longer than the text
        end = 0
    return text.partition("\n")[0].strip() == "{" or "\n" in text[:end]


def values(file: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield `(line, value)` for each JSON value of `file`, one after the other, with a Malformed for invalid text."""
    window = _Window(file, _AT_LINE)
    while window.peek():
        line = window.line
        yield line, window.decode()


def elements(file: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield `(line, element)` for each element of the array in `file`, with a Malformed for an element that is invalid.

    Text after the closing bracket and a missing closing bracket are yielded as Malformed, too.
    Raises ValueError when the file does not begin with an array.
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

"""Open files of text, plain or compressed, such that a damaged one gives what can be read of it and then says so."""

from __future__ import annotations

import bz2
import codecs
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import zstandard

from corpora.json_array import CHUNK
from corpora.registry import RAW_CHARS, BadRecord

# suffix -> a new decompressor for one member of a file
PACKED: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),  # 16: with gzip's header
    "zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}
_INPUT = 1 << 10  # compressed bytes that are unpacked at a time: at an error, what these hold is lost


class Record(NamedTuple):
    """One record of a file and its place: the value is a str (txt), a dict (csv, parquet) or any JSON value."""

    where: str
    value: Any


class Damaged(Exception):
    """A file could be read up to some place only; the message says why."""


def bad(where: str, reason: str, raw: str) -> BadRecord:
    """Return a BadRecord; its raw text is cut, and all is escaped where it is not UTF-8, so that it can be shown."""
    return BadRecord(*map(printable, (where, reason, raw[:RAW_CHARS])))


def printable(text: str) -> str:
    """Return a text with lone surrogates as their escapes, which any file or terminal takes."""
    return text.encode("utf8", "backslashreplace").decode()


class Unpacked(io.RawIOBase):
    """The plain bytes of a compressed file. Where it is damaged or cut off, they end, and `damage` says why."""

    def __init__(self, path: Path, new: Callable[[], Any]) -> None:
        """new: makes a decompressor for one member of the file; a file may have several, one after the other."""
        self._file, self._new = path.open("rb"), new
        self._member: Any = None
        self._ready, self._ended = memoryview(b""), False
        self.damage = "" if path.stat().st_size else "it has no bytes"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            self._ready = memoryview(b"".join(self._unpack(self._file.read(_INPUT))))
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def _unpack(self, data: bytes) -> Iterator[bytes]:
        self._ended = not data
        if self._ended and self._member is not None:
            self.damage = "it is cut off"
        try:
            while data:
                if self._member is None:
                    data = data.lstrip(b"\0")  # zeros may fill up a file behind its last member
                    self._member = self._new() if data else None
                else:
                    yield self._member.decompress(data)
                    data = self._member.unused_data if self._member.eof else b""
                    self._member = None if self._member.eof else self._member
        except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError) as error:
            self._ended, self.damage = True, str(error)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path, newline: str) -> tuple[io.RawIOBase, TextIO]:
    new = PACKED.get(path.suffix[1:].lower())
    raw: io.RawIOBase = path.open("rb", buffering=0) if new is None else Unpacked(path, new)
    stream = io.BufferedReader(raw)
    if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return raw, io.TextIOWrapper(stream, encoding="utf-16", errors="surrogatepass", newline=newline)
    return raw, io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


@contextmanager
def open_text(path: Path, newline: str = "\n") -> Iterator[TextIO]:
    """Open a file as text: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Bytes that are not UTF-8 are read as lone surrogates, which `has_bytes` finds. Of a damaged file the text ends where
    the damage is, and the block ends with Damaged.
    """
    raw, file = _open(path, newline)
    with file:
        yield file
    if damage := getattr(raw, "damage", ""):
        raise Damaged(damage)


def beginning(path: Path) -> str:
    """Return the first characters of a file, up to CHUNK, as `open_text` reads them."""
    _, file = _open(path, "\n")
    with file:
        return file.read(CHUNK)


def has_bytes(text: str) -> bool:
    """Return whether a text of `open_text` has a byte that is not UTF-8."""
    return _surrogate(text) is not None


def _surrogate(text: str) -> int | None:
    """Return the place of the first lone surrogate in a text."""
    try:
        text.encode("utf8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def not_utf8(text: str) -> str:
    """Return in words that a text with lone surrogates is not UTF-8, where, and what helps; "" for other texts."""
    place = _surrogate(text)
    if place is None:
        return ""
    words = f"not UTF-8 at character {place + 1}"
    if not "\udc80" <= text[place] <= "\udcff":  # no byte, but half a character, written as an escape in JSON
        return words
    if is_gb18030(text):
        return f"{words}; it looks like GBK or GB18030: convert the file with iconv -f gb18030 -t utf-8 FILE > NEW_FILE"
    return f"{words}; if it is of another encoding, convert the file with iconv"


def is_gb18030(text: str) -> bool:
    """Return whether the bytes of a text of `open_text` seem to be Chinese in GBK or GB18030.

    Nearly any bytes are characters there; so four in five of them have to be frequent ones, those of GB 2312.
    """
    try:
        decoded = text.encode("utf8", "surrogateescape").decode("gb18030")
    except UnicodeError:
        return False
    foreign = [character for character in decoded if not character.isascii()]
    frequent = [character for character in foreign if len(character.encode("gb2312", "ignore"))]
    return len(frequent) >= 0.8 * len(foreign)

"""From a stream of ids to pieces of text: whole characters, and no part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tokenizer import Tokenizer


class StopStrings:
    """Texts that end an answer; the answer is the text before the first of them.

    Bytes are compared, so a stop string may begin and end within tokens, and its characters may be split over tokens.
    The string that is complete first counts; of several that end together, the longest. Raises ValueError for an empty
    string.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Iterable[str] = ()) -> None:
        self._to_bytes = tokenizer.id_to_bytes
        self.strings = tuple(string.encode() for string in strings)
        if b"" in self.strings:
            raise ValueError("a stop string is empty, and so would be every answer; leave it out")
        self._longest = max(map(len, self.strings), default=0)

    def ended(self, ids: Sequence[int]) -> bool:
        """Return whether the last of `ids`, the ids of an answer so far, completes a stop string."""
        if not self.strings or not ids:
            return False
        tail, n = self._to_bytes(ids[-1]), len(ids) - 1
        wanted = len(tail) + self._longest - 1  # no stop string that ends in the last id begins earlier
        while n and len(tail) < wanted:
            n -= 1
            tail = self._to_bytes(ids[n]) + tail
        return self.find(tail) is not None

    def find(self, text: bytes) -> int | None:
        """Return the position in `text` at which the first complete stop string begins; None: there is none."""
        found = ((text.find(stop), len(stop)) for stop in self.strings)
        return min(((at + size, at) for at, size in found if at >= 0), default=(0, None))[1]

    def before(self, text: str) -> str:
        """Return `text` up to the first complete stop string; all of it where there is none."""
        whole = text.encode()
        return whole[: self.find(whole)].decode()

    def held_back(self, text: bytes) -> int:
        """Return how many of the last bytes of `text` may be the beginning of a stop string; none is complete in it."""
        sizes = range(min(len(text), self._longest - 1), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self.strings)), 0)


class Pieces:
    """The text of a stream of ids, in pieces, up to a stop string.

    The bytes of a character wait until it is complete, and the beginning of a possible stop string waits until it is
    clear whether it is one. `ended` tells whether a stop string was complete.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: StopStrings | None = None, visible: Mapping[int, bytes] | None = None
    ) -> None:
        """visible: special tokens that are text here."""
        self.ended, self._visible = False, visible or {}
        self._to_bytes, self._stop = tokenizer.id_to_bytes, stop or StopStrings(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf8")(errors="replace")
        self._waiting = b""

    def add(self, i: int) -> str:
        """Take one more id; return the text that no later id can change, without what was returned before."""
        self._waiting += self._visible.get(i) or self._to_bytes(i)
        end = self._stop.find(self._waiting)
        if end is not None:
            self.ended, self._waiting = True, self._waiting[:end]
            return ""
        ready = len(self._waiting) - self._stop.held_back(self._waiting)
        piece, self._waiting = self._decoder.decode(self._waiting[:ready]), self._waiting[ready:]
        return piece

    def rest(self) -> str:
        """Return the text that has waited, when no more ids come."""
        return self._decoder.decode(self._waiting, final=True)


def text_pieces(tokenizer: Tokenizer, ids: Iterable[int], stop: StopStrings | None = None) -> Iterator[str]:
    """Yield the text of a stream of ids in pieces, up to a stop string; see `Pieces`."""
    pieces = Pieces(tokenizer, stop)
    for i in ids:
        if piece := pieces.add(i):
            yield piece
        if pieces.ended:
            break
    if piece := pieces.rest():
        yield piece

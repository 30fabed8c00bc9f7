"""From a stream of ids to text as it may be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from tokenizer import Tokenizer


class StopStrings:
    """Texts at which an answer ends, wherever the tokens' borders fall; the answer is what stands before.

    Bytes are compared, so a stop string may be spelled by parts of several tokens, single bytes of a character
    included. The one that is complete first counts, of several that end together the longest. Without strings nothing
    ends. Raises ValueError for an empty one.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Iterable[str] = ()) -> None:
        self._to_bytes = tokenizer.id_to_bytes
        self.strings = tuple(string.encode() for string in strings)
        if b"" in self.strings:
            raise ValueError("a stop string is empty, and so would be every answer; leave it out")
        self._longest = max(map(len, self.strings), default=0)

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether the last of `ids`, an answer's so far, completes a stop string."""
        if not self.strings or not ids:
            return False
        tail, n = self._to_bytes(ids[-1]), len(ids) - 1
        wanted = len(tail) + self._longest - 1  # what is older lies too far back
        while n and len(tail) < wanted:
            n -= 1
            tail = self._to_bytes(ids[n]) + tail
        return self.find(tail) is not None

    def find(self, text: bytes) -> int | None:
        """Where the first complete stop string begins in `text`."""
        found = ((text.find(stop), len(stop)) for stop in self.strings)
        return min(((at + size, at) for at, size in found if at >= 0), default=(0, None))[1]

    def before(self, text: str) -> str:
        """What stands before the first complete stop string, all of `text` where there is none."""
        whole = text.encode()
        return whole[: self.find(whole)].decode()

    def held_back(self, text: bytes) -> int:
        """How many of the last bytes of `text`, in which no stop string is complete, may be the beginning of one."""
        sizes = range(min(len(text), self._longest - 1), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self.strings)), 0)


def text_pieces(tokenizer: Tokenizer, ids: Iterable[int], stop: StopStrings | None = None) -> Iterator[str]:
    """The text of a stream of ids, piece by piece, up to a stop string.

    Never half a character: bytes wait until theirs is complete. And nothing of a stop string: what may be the
    beginning of one, and no more, waits until that is decided.
    """
    stop = stop or StopStrings(tokenizer)
    decoder = codecs.getincrementaldecoder("utf8")(errors="replace")
    waiting = b""
    for i in ids:
        waiting += tokenizer.id_to_bytes(i)
        end = stop.find(waiting)
        if end is not None:
            waiting = waiting[:end]
            break
        ready = len(waiting) - stop.held_back(waiting)
        if piece := decoder.decode(waiting[:ready]):
            yield piece
        waiting = waiting[ready:]
    if piece := decoder.decode(waiting, final=True):
        yield piece

"""Cut long documents of the user's files into parts, so that a book is not held out, or trained on, as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from corpora.registry import BadRecord, Document

_MARKS = ("\n\n", "\n", "。", ". ", " ")  # a cut comes behind the first of these marks that is near its place


def in_parts(stream: Iterable[Document | BadRecord], size: int) -> Iterator[Document | BadRecord]:
    """Yield the stream with every document above `size` characters as several documents; size 0: as it is."""
    for item in stream:
        if isinstance(item, BadRecord) or not size or len(item.text) <= size:
            yield item
        else:
            yield from (replace(item, text=part) for part in parts(item.text, size))


def parts(text: str, size: int) -> Iterator[str]:
    """Yield the text in parts of about equal length, at most `size` characters, cut at paragraphs, lines, sentences."""
    at = 0
    while (left := len(text) - at) > size:
        # With equal parts, the last one is not so short that it would be dropped.
        end = at + math.ceil(left / math.ceil(left / size))
        earliest = at + (end - at) * 3 // 4
        for mark in _MARKS:
            if (found := text.rfind(mark, earliest, end)) >= 0:
                end = min(found + len(mark), end)
                break
        yield text[at:end]
        at = end
    yield text[at:]

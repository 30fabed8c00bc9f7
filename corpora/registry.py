"""Define what a corpus is, and keep the registry of named corpora.

A corpus yields documents (for pretraining) and perhaps conversations (for fine-tuning), both as streams.
To add a corpus, write one function:

    @register("sanguo", description="...", licence="...")
    def sanguo(raw_dir: Path) -> Iterator[Document | BadRecord]: ...
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """One text for pretraining."""

    text: str
    source: str
    """Name of the corpus or file, used for the counts per source."""
    held_out: bool | None = None
    """True: not for training. None: the caller decides by the hash of the text."""


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read. Yielded instead of raised, so that one broken record does not end a run."""

    where: str
    """Place of the record, `file:line`; for parquet the row, counted from 1."""
    reason: str
    raw: str
    """Original text of the record, cut to RAW_CHARS characters."""


class DamagedFile(BadRecord):
    """A file that can be read up to the place `where` only, or not at all; what was read of it counts."""


@dataclass(frozen=True)
class Conversation:
    """One sample for fine-tuning."""

    messages: list[dict]
    """`[{"role": "user" | "assistant" | "system", "content": str}, ...]`."""
    held_out: bool
    task: str
    """Kind of the exchange, such as "title" or "dialogue"."""


RAW_CHARS = 2000


@dataclass(frozen=True)
class Corpus:
    """A named corpus. Both functions take the folder of raw files and download into it what they need."""

    name: str
    description: str
    licence: str
    documents: Callable[[Path], Iterator[Document | BadRecord]]
    conversations: Callable[[Path], Iterator[Conversation]] | None = None
    text_bytes: int | None = None
    """Rough size of the text in bytes, for a progress bar; None: the size of the files in raw_dir/NAME."""
    examples: tuple[str, ...] = ()
    """What to ask a model that was trained on the conversations."""


CORPORA: dict[str, Corpus] = {}


def register(
    name: str,
    *,
    description: str,
    licence: str,
    conversations: Callable[[Path], Iterator[Conversation]] | None = None,
    text_bytes: int | None = None,
    examples: tuple[str, ...] = (),
) -> Callable:
    """Register the decorated function, `documents(raw_dir)`, in CORPORA under `name`."""

    def enter(documents: Callable[[Path], Iterator[Document | BadRecord]]) -> Callable:
        CORPORA[name] = Corpus(name, description, licence, documents, conversations, text_bytes, examples)
        return documents

    return enter


def stable_share(key: str) -> float:
    """Return a number in [0, 1) that depends on `key` alone: the same on every machine and in every process.

    It is the first 8 bytes of the key's SHA-256 as an integer, divided by 2^64.
    """
    return int.from_bytes(hashlib.sha256(key.encode("utf8")).digest()[:8], "big") / 2**64

"""What a corpus is, and the registry of those known by name.

A corpus gives documents (for pretraining) and perhaps conversations (for fine-tuning), both as streams.
Adding one is adding one function:

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
    """The corpus' or file's name, for counting."""
    held_out: bool | None = None
    """True: never to be trained on. None: the caller decides by the hash of the text."""


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read; counted and kept aside, never an exception."""

    where: str
    """`file:line`; for parquet the row, counted from 1."""
    reason: str
    raw: str
    """The record as found, cut to RAW_CHARS characters."""


@dataclass(frozen=True)
class Conversation:
    """One sample for fine-tuning."""

    messages: list[dict]
    """`[{"role": "user" | "assistant" | "system", "content": str}, ...]`."""
    held_out: bool
    task: str
    """What kind of exchange this is, such as "poem"."""


RAW_CHARS = 2000


@dataclass(frozen=True)
class Corpus:
    """A named corpus; both streams take the folder of raw files and fetch there what they need."""

    name: str
    description: str
    licence: str
    documents: Callable[[Path], Iterator[Document | BadRecord]]
    conversations: Callable[[Path], Iterator[Conversation]] | None = None
    text_bytes: int | None = None
    """About how much text there is, to show how far reading it is; None: as much as the files in raw_dir/NAME hold."""


CORPORA: dict[str, Corpus] = {}


def register(
    name: str,
    *,
    description: str,
    licence: str,
    conversations: Callable[[Path], Iterator[Conversation]] | None = None,
    text_bytes: int | None = None,
) -> Callable:
    """Enter the decorated function, `documents(raw_dir)`, in CORPORA under `name`."""

    def enter(documents: Callable[[Path], Iterator[Document | BadRecord]]) -> Callable:
        CORPORA[name] = Corpus(name, description, licence, documents, conversations, text_bytes)
        return documents

    return enter


def stable_share(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(key.encode("utf8")).digest()[:8], "big") / 2**64

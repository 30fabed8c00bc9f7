"""Corpora: texts by name, the user's own files, and the user's own loader, behind one stream of documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli.args import nearest
from corpora import bilingual, files, named, poems  # noqa: F401 - importing them fills CORPORA
from corpora.files import read_files, read_loader
from corpora.registry import CORPORA, BadRecord, Conversation, Corpus, Document

__all__ = [
    "CORPORA",
    "BadRecord",
    "Conversation",
    "Corpus",
    "Document",
    "SourceArgs",
    "read",
    "read_conversations",
    "text_size",
]


@dataclass(frozen=True)
class SourceArgs:
    """Where the texts come from."""

    corpus: tuple[str, ...] = ()
    """Corpora by name; none: the poems, unless --input or --loader says otherwise."""
    input: tuple[Path, ...] = ()
    """Your own files or folders: txt, json, jsonl, csv, tsv or parquet, plain or .gz / .zst."""
    text_key: str = "text"
    """The key or column that holds the text in your own files."""
    loader: Path | None = None
    """Your own Python file with a data_loader() generator that yields strings, or dicts with --text_key."""
    raw_dir: Path = Path("data/raw")
    """Where fetched packages and the files of named corpora lie."""

    def corpora(self) -> list[Corpus]:
        """The named corpora to read; raises ValueError for a name that is not known."""
        names = self.corpus or (() if self.input or self.loader else ("poems",))
        for name in names:
            if name not in CORPORA:
                raise ValueError(f"unknown corpus {name!r}{nearest(name, CORPORA)}; known are {', '.join(CORPORA)}")
        return [CORPORA[name] for name in names]


def read(source: SourceArgs) -> Iterator[Document | BadRecord]:
    """Every document of `source`, in a fixed order, streaming; records that cannot be read come as BadRecord.

    Raises at once, before any document is read: ValueError for an unknown corpus or a file of unknown format,
    FileNotFoundError for a path that is not there. A package is fetched when its turn comes: FetchError, an OSError.
    """
    streams = [corpus.documents(source.raw_dir) for corpus in source.corpora()]
    streams += [read_files(path, source.text_key) for path in source.input]
    if source.loader:
        streams.append(read_loader(source.loader, source.text_key))
    return itertools.chain.from_iterable(streams)


def read_conversations(source: SourceArgs) -> Iterator[Conversation]:
    """Every conversation of the named corpora that have any, in a fixed order; ValueError for an unknown corpus."""
    return itertools.chain.from_iterable(
        corpus.conversations(source.raw_dir) for corpus in source.corpora() if corpus.conversations
    )


def text_size(source: SourceArgs) -> int | None:
    """About how many bytes of text `read` gives, to show how far it is; None where nobody knows, as with a loader."""
    if source.loader:
        return None
    size = sum(files.text_size(path) for path in source.input)
    for corpus in source.corpora():
        folder = source.raw_dir / corpus.name
        if corpus.text_bytes is None and not folder.is_dir():
            return None
        size += files.text_size(folder) if corpus.text_bytes is None else corpus.text_bytes
    return size

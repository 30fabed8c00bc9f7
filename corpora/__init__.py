"""Read named corpora, the user's own files and the user's own loader as one stream of documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli.args import nearest
from cli.flags import SET, Needs, check_flags
from corpora import bilingual, files, named, poems  # noqa: F401 - importing them fills CORPORA
from corpora.files import FORMS, read_files, read_loader
from corpora.parts import in_parts
from corpora.registry import CORPORA, BadRecord, Conversation, Corpus, DamagedFile, Document

__all__ = [
    "CORPORA",
    "BadRecord",
    "Conversation",
    "Corpus",
    "DamagedFile",
    "Document",
    "SourceArgs",
    "read",
    "read_conversations",
    "text_size",
]


OWN = "named corpora have forms of their own; remove it"
NEEDS = (
    Needs("text_key", "input or loader", SET, OWN),
    Needs("format", "input", SET, OWN),
    Needs("part_chars", "input or loader", SET, "only documents of your own files are cut; remove it"),
)


@dataclass(frozen=True)
class SourceArgs:
    """Where the texts come from."""

    corpus: tuple[str, ...] = ()
    """Names of corpora to read. Without --corpus, --input and --loader, the corpus poems is read."""
    input: tuple[Path, ...] = ()
    """Your own files or folders: txt, json, jsonl, csv, tsv or parquet, plain or compressed (.gz, .zst, .bz2, .xz)."""
    text_key: str = "text"
    """The key (JSON) or column (csv, parquet) of your own files that holds the text."""
    format: str = "auto"
    """What a document of your txt files is: lines, paragraphs (separated by blank lines) or file; auto: paragraphs if
    the first megabyte has blank lines, otherwise lines."""
    part_chars: int = 10_000
    """Longer documents of your own files are cut into parts of at most so many characters, at paragraphs or lines, and
    each part is a document: held out, or dropped as a duplicate, by itself. 0: never cut."""
    loader: Path | None = None
    """Your own Python file with a generator data_loader() that yields strings, or dicts with the key --text_key."""
    raw_dir: Path = Path("data/raw")
    """Folder for downloaded packages, and for the files of named corpora that you download yourself."""

    def __post_init__(self) -> None:
        """Raise ValueError where a flag needs another one."""
        check_flags(self, NEEDS)

    def corpora(self) -> list[Corpus]:
        """Return the named corpora to read; raises ValueError for an unknown name."""
        names = self.corpus or (() if self.input or self.loader else ("poems",))
        for name in names:
            if name not in CORPORA:
                known = ", ".join(CORPORA)
                raise ValueError(f"--corpus: unknown corpus {name!r}{nearest(name, CORPORA)}; corpora are {known}")
        return [CORPORA[name] for name in names]


def read(source: SourceArgs) -> Iterator[Document | BadRecord]:
    """Yield every document of `source` in a fixed order; a record that cannot be read comes as a BadRecord.

    Raises before the first document: ValueError for an unknown corpus or a file of unknown format, FileNotFoundError
    for a missing path. Packages are downloaded during the iteration, which raises FetchError (an OSError) on failure.
    """
    if source.format not in FORMS:
        raise ValueError(f"--format should be {', '.join(FORMS[:-1])} or {FORMS[-1]}, found {source.format!r}")
    if source.part_chars < 0:
        raise ValueError(f"--part_chars should be at least 0 (never cut), found {source.part_chars}")
    streams = [corpus.documents(source.raw_dir) for corpus in source.corpora()]
    own = [read_files(path, source.text_key, source.format) for path in source.input]
    if source.loader:
        own.append(read_loader(source.loader, source.text_key))
    return itertools.chain(*streams, *(in_parts(stream, source.part_chars) for stream in own))


def read_conversations(source: SourceArgs) -> Iterator[Conversation]:
    """Yield every conversation of the named corpora in a fixed order; raises ValueError for an unknown corpus."""
    return itertools.chain.from_iterable(
        corpus.conversations(source.raw_dir) for corpus in source.corpora() if corpus.conversations
    )


def text_size(source: SourceArgs) -> int | None:
    """Return roughly how many bytes of text `read` yields, for a progress bar; None if unknown, as with a loader."""
    if source.loader:
        return None
    size = sum(files.text_size(path) for path in source.input)
    for corpus in source.corpora():
        folder = source.raw_dir / corpus.name
        if corpus.text_bytes is None and not folder.is_dir():
            return None
        size += files.text_size(folder) if corpus.text_bytes is None else corpus.text_bytes
    return size

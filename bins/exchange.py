"""Write the documents of one token format in another: ours to those of other programs, and back."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bins import megatron, packed, pickled_rows
from bins.foreign import NAMES, Found, Group, documents
from bins.token_bin import UINT16_IDS, BinWriter, TokenBin
from cli.progress import track
from files import json_line
from tokenizer import Tokenizer

TARGETS = ("bins", "megatron", "packed", "raw")
INDEXED = ("bins", "megatron")  # formats that say where a document begins


@dataclass(frozen=True)
class Vocabulary:
    """What a conversion needs to know of the ids."""

    name: str
    """where it is from, for errors"""
    size: int
    eos_id: int
    sha256: str
    begins: tuple[int, ...] = ()
    """ids before the text of a document"""
    bos_id: int | None = None
    n_bytes: np.ndarray | None = None
    """UTF-8 bytes of each id, (size,); None where no tokenizer was given"""
    dummy_prefix: bool = False
    """whether the tokenizer puts a space before every text"""

    def text_bytes(self, ids: np.ndarray) -> int:
        """Return the bytes of the text of a document."""
        if self.n_bytes is None:
            return 0
        n = int(self.n_bytes[ids].sum())
        return n - 1 if self.dummy_prefix and n else n


def of_tokenizer(tokenizer: Tokenizer, path: Path) -> Vocabulary:
    """Return what a tokenizer says. Raises ValueError for one without eos, which ends our documents."""
    if tokenizer.eos_id is None:
        raise ValueError(f"--tokenizer {path} has no eos, which ends the documents of a token bin: give one that has")
    own = (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256(), tuple(tokenizer.begins), tokenizer.bos_id)
    return Vocabulary(f"--tokenizer {path}", *own, tokenizer.token_bytes(), tokenizer.dummy_prefix)


def of_bins(found: Found) -> Vocabulary:
    """Return what our bins say of their ids; their files are compared with what they say of them.

    Raises ValueError where they are damaged, or made with several tokenizers.
    """
    known = None
    for path in (path for group in found.groups for path in group.paths):
        bin = TokenBin(path)
        own = Vocabulary(str(path), *(bin.meta[key] for key in ("vocab_size", "eos_id", "tokenizer_sha256")))
        bin.check(own.sha256, own.size, bin.bos)
        if known and known.sha256 != own.sha256:
            raise ValueError(f"{known.name} and {own.name} were made with different tokenizers; convert them apart")
        known = known or own
    return known  # type: ignore[return-value]  # there is at least one file


@dataclass
class Settings:
    """How the target is written, and how the source is cut."""

    form: str
    separator: str = "eos"
    """eos after each document, or bos before each, in a source without an index"""
    tokens_per_file: int = 100_000_000
    chunk_tokens: int = 2049 * 1024 * 8


@dataclass
class Counts:
    """Counts of what was written for one role: train or heldout."""

    files: str
    documents: int = 0
    tokens: int = 0
    ended: int = 0
    """documents that did not end with eos, and got one"""
    empty: int = 0
    """documents without ids, which are left out"""
    sources: Counter[str] = field(default_factory=Counter)


class Target(Protocol):
    """What writes documents."""

    def add(self, ids: np.ndarray) -> None: ...

    def close(self) -> None: ...


# ---- documents


def whole(group: Group, form: str, vocabulary: Vocabulary, settings: Settings, counts: Counts) -> Iterator[np.ndarray]:
    """Yield the documents of a group, all of which end with eos. Raises ValueError for ids outside the vocabulary,
    and where no document of a format without an index ends with its separator."""
    before = settings.separator == "bos" and form not in INDEXED
    separator = vocabulary.bos_id if before else vocabulary.eos_id
    if separator is None:
        raise ValueError(f"--separator bos: {vocabulary.name} has no bos; use --separator eos")
    number, parted = 0, form in INDEXED
    for number, ids in enumerate(documents(group, form, separator, before), 1):
        if not ids.size:
            counts.empty += 1
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary.size:
            raise ValueError(
                f"{group.paths[0]}: document {number - 1} of {group.name} has the id {low if low < 0 else high}, and "
                f"{vocabulary.name} has {vocabulary.size} ids: it was made with another tokenizer"
            )
        parted = parted or ids[0 if before else -1] == separator
        if ids[-1] != vocabulary.eos_id:
            ids = np.append(ids, vocabulary.eos_id)
            counts.ended += 1
        counts.documents += 1
        counts.tokens += ids.size
        counts.sources[group.name] += 1
        yield ids
    if number and not parted:
        raise ValueError(
            f"{group.paths[0]} has no {settings.separator} (id {separator}): it was made with another tokenizer than "
            f"{vocabulary.name}, or its documents are parted by another id; see --separator"
        )


# ---- targets


class Bins:
    """Write our bins: `train_00000` and on, of at most `tokens_per_file` ids each; `heldout`, `test` in one."""

    def __init__(self, folder: Path, role: str, vocabulary: Vocabulary, tokens_per_file: int) -> None:
        self.folder, self.role, self.vocabulary, self.most = folder, role, vocabulary, tokens_per_file
        self.number, self.source = 0, ""
        self._open()

    def _open(self) -> None:
        own = self.vocabulary
        name = f"train_{self.number:05d}" if self.role == "train" else self.role
        # its documents begin with the tokenizer's ids until one does not
        self.writer = BinWriter(self.folder / name, own.size, own.eos_id, own.sha256, bos=own.begins)

    def add(self, ids: np.ndarray) -> None:
        """Append one document, which ends with eos."""
        if self.role == "train" and self.writer.documents and self.writer.tokens + len(ids) > self.most:
            self.writer.close()
            self.number += 1
            self._open()
        if self.writer.bos and ids[: len(self.writer.bos)].tolist() != self.writer.bos:
            self.writer.bos = []
        self.writer.add(ids, self.source, self.vocabulary.text_bytes(ids))

    def close(self) -> None:
        """Finish the last file."""
        self.writer.close()


class Raw:
    """Write ids as uint16 without a header. Raises ValueError for a vocabulary that does not fit."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        if vocab_size > UINT16_IDS:
            raise ValueError(
                f"--format raw stores ids as uint16, up to {UINT16_IDS}, and the vocabulary has {vocab_size}; choose "
                "megatron or packed"
            )
        self._file = path.open("wb")

    def add(self, ids: np.ndarray) -> None:
        """Append one document."""
        self._file.write(ids.astype("<u2").tobytes())

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def target(folder: Path, role: str, vocabulary: Vocabulary, settings: Settings) -> tuple[Target, str]:
    """Return what writes the documents of a role, and the names of its files for a reader."""
    if settings.form == "bins":
        name = "train_*.bin" if role == "train" else f"{role}.bin"
        return Bins(folder, role, vocabulary, settings.tokens_per_file), name
    if settings.form == "megatron":
        return megatron.Writer(folder / role, vocabulary.size), f"{role}.bin, {role}.idx"
    if settings.form == "packed":
        writer = packed.Writer(folder / role, vocabulary.size, vocabulary.eos_id, settings.chunk_tokens)
        return writer, f"{role}_*.bin"
    name = {"heldout": "val"}.get(role, role)  # nanoGPT's name
    return Raw(folder / f"{name}.bin", vocabulary.size), f"{name}.bin"


# ---- the conversion


def exchange(found: Found, folder: Path, vocabulary: Vocabulary, settings: Settings) -> list[Counts]:
    """Write what was found into `folder` in the format of the settings; returns the counts of each role."""
    if settings.form == found.form:
        raise ValueError(f"--source is {NAMES[found.form]} already: choose another --format than {settings.form}")
    if found.form in INDEXED and settings.separator != "eos":
        raise ValueError(f"--separator {settings.separator} does nothing: {NAMES[found.form]} has an index; remove it")
    done = []
    for role, groups in found.by_role().items():
        writer, files = target(folder, role, vocabulary, settings)
        counts = Counts(files)
        for group in groups:
            if isinstance(writer, Bins):
                writer.source = group.name
            for ids in track(whole(group, found.form, vocabulary, settings, counts), group.name, "documents"):
                writer.add(ids)
        if not counts.documents:
            raise ValueError(f"{groups[0].paths[0]} has no documents: there is nothing to write")
        writer.close()
        done.append(counts)
    return done


def write_answers(found: Found, folder: Path, tokenizer: Tokenizer) -> list[Counts]:
    """Write the questions and answers of llm-lite-trainer as sft_train.jsonl (sft_heldout.jsonl); returns the counts.

    The texts are decoded from the ids: fine_tuning.py encodes them anew, with the template of the model.
    """
    done = []
    for role, groups in found.by_role().items():
        counts = Counts(f"sft_{role}.jsonl")
        with (folder / counts.files).open("wb") as file:
            for group in groups:
                for record in track(answers(group, tokenizer), group.name, "records"):
                    file.write(json_line(record))
                    counts.documents += 1
        done.append(counts)
    return done


def answers(group: Group, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Yield the questions and answers of a group as records."""
    for path in group.paths:
        for question, answer in pickled_rows.exchanges(path):
            for ids in (question, answer):
                if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
                    raise ValueError(
                        f"{path} has ids outside of the {tokenizer.vocab_size} of --tokenizer: give the tokenizer that "
                        "the ids were made with"
                    )
            yield {"prompt": tokenizer.decode(question.tolist()), "answer": tokenizer.decode(answer.tolist())}


def copy_tokenizer(tokenizer: Tokenizer | None, beside: Path, folder: Path) -> None:
    """Put the tokenizer into the folder of the data: the one given, else that of the source, where there is one."""
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    elif beside.is_dir():
        shutil.copytree(beside, folder / "tokenizer")


def lines(done: Iterable[Counts]) -> Iterator[str]:
    """Yield in words what was written."""
    for counts in done:
        if not counts.tokens:
            yield f"{counts.files}: {counts.documents:,} questions with answers"
            continue
        text = f"{counts.files}: {counts.documents:,} documents, {counts.tokens:,} tokens"
        text += f"; {counts.ended:,} did not end with eos and got one" * bool(counts.ended)
        yield text + f"; {counts.empty:,} without ids are left out" * bool(counts.empty)

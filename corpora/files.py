"""Read the user's own texts: files and folders in the usual formats, and a Python file with a generator.

Formats: txt, json (an array, or one value a line), jsonl, csv, tsv, parquet; all but parquet also .gz, .zst, .bz2, .xz.
Everything streams in bounded memory. A record that cannot be read becomes a BadRecord that names its file and line.

- txt: if the first megabyte contains blank lines, they separate documents; otherwise each line is a document. --format
  says it otherwise. A byte that is not UTF-8 costs its line.
- csv: commas, quotes as in RFC 4180; tsv: tabs, no quotes. Both begin with a header row.
- json and jsonl: an object may go over several lines, if the first one does.
- A file without suffix is read as JSON lines if it begins with `{`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from corpora.json_array import MAX_CHARS, Malformed, elements, spreads, values
from corpora.registry import BadRecord, DamagedFile, Document
from corpora.streams import PACKED, Damaged, Record, bad, beginning, has_bytes, not_utf8, open_text
from corpora.tables import read_csv, read_parquet

FORMATS = ("txt", "json", "jsonl", "ndjson", "csv", "tsv", "parquet")
FORMS = ("auto", "lines", "paragraphs", "file")  # what a document of a txt file is
UNPACKED_RATIO = 3  # estimate: compressed Chinese, English and JSON text grows to 2.5 to 4 times its size
_EXPECTED = f"{', '.join(FORMATS)} (plain, {', '.join(f'.{each}' for each in PACKED)})"
_BROKEN = (Damaged, OSError, pa.ArrowException, UnicodeDecodeError)


# --- which files ------------------------------------------------------------------------------------------------


def format_of(path: Path) -> str | None:
    """Return the format of a file, one of FORMATS, or None if it has no such format."""
    suffixes = [suffix[1:].lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in PACKED
    suffix = suffixes[-2 if packed else -1] if len(suffixes) > packed else ""
    if suffix in FORMATS and not (packed and suffix == "parquet"):
        return suffix
    if not suffixes:
        with path.open("rb") as file:
            return "jsonl" if file.read(1) == b"{" else None
    return None


def find_files(path: Path) -> list[Path]:
    """Return the readable files at `path`, a file or a folder with its subfolders, sorted; never an empty list.

    Raises FileNotFoundError for a missing path, ValueError for a folder without such files or an unknown format.
    """
    if path.is_dir():
        for folder in (path, *(p for p in path.rglob("*") if p.is_dir())):
            if not os.access(folder, os.R_OK | os.X_OK):  # otherwise its files would be left out in silence
                raise PermissionError(
                    f"{folder}: no permission to read this folder; change it, or give another --input"
                )
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted(p for p in inside if p.is_file() and format_of(p))
        if not files:
            raise ValueError(f"the folder {path} has no file to read; expected {_EXPECTED}")
        return files
    if not path.exists():
        raise FileNotFoundError(f"{path}: no file or folder of this name")
    _reader(path)
    return [path]


def text_size(path: Path) -> int:
    """Return roughly how many bytes of text a file or folder holds; raises the errors of `find_files`."""
    size = 0
    for file in find_files(path):
        packed = file.suffix[1:].lower() in (*PACKED, "parquet")
        size += file.stat().st_size * (UNPACKED_RATIO if packed else 1)
    return size


# --- records of one file ----------------------------------------------------------------------------------------


def records(path: Path, columns: list[str] | None = None, form: str = "auto") -> Iterator[Record | BadRecord]:
    """Yield every record of one file. Raises ValueError for a file of unknown format.

    columns: the only columns to read from a parquet file; a csv or parquet file without one of them is a BadRecord.
    form: what a document of a txt file is, one of FORMS.
    A damaged file gives the records before its damage, then a DamagedFile.
    """
    place = str(path)
    read = _reader(path)
    if format_of(path) == "txt":
        read = partial(read, form=form)
    try:
        for record in read(path, columns):
            place = record.where
            yield record
    except FileNotFoundError:
        raise
    except _BROKEN as error:
        yield DamagedFile(place, f"the file is broken after this place: {error}; what is before it is kept", "")


def _reader(path: Path) -> Callable[[Path, list[str] | None], Iterator[Record | BadRecord]]:
    if format_of(path) is None:
        raise ValueError(f"{path}: its name shows no known format; expected {_EXPECTED}")
    return _READERS[format_of(path)]


def _lines(file: TextIO) -> Iterator[str]:
    """Yield lines with their line ends; a line longer than MAX_CHARS comes in pieces of that size."""
    return iter(lambda: file.readline(MAX_CHARS), "")


def _read_txt(path: Path, columns: list[str] | None, form: str = "auto") -> Iterator[Record | BadRecord]:
    """Yield each document: a line, a paragraph (lines between blank lines) or the file; auto: as it looks."""
    has_blocks = form == "auto" and re.search(r"\n\s*\n", beginning(path).strip())
    with open_text(path) as file:
        numbered = enumerate(_lines(file), 1)
        if form in ("paragraphs", "file") or has_blocks:
            yield from _blocks(path, numbered, whole=form == "file")
        else:
            yield from (Record(f"{path}:{n}", line.rstrip("\r\n")) for n, line in numbered if line.strip())


def _blocks(path: Path, numbered: Iterable[tuple[int, str]], whole: bool) -> Iterator[Record | BadRecord]:
    """Yield the lines between blank lines as one record, or all lines if `whole`; a line with a broken byte apart.

    A record ends at MAX_CHARS characters, too: otherwise a file without further blank lines would fill the memory.
    """
    block, start, size = [], 1, 0
    for number, line in itertools.chain(numbered, [(0, "")]):
        ends = not number or (not line.strip() and not whole)
        if block and (ends or size + len(line) > MAX_CHARS):
            yield Record(f"{path}:{start}", "".join(block).rstrip("\r\n"))
            block, size = [], 0
        if has_bytes(line):  # costs the line, not the whole block
            yield Record(f"{path}:{number}", line.rstrip("\r\n"))  # `to_documents` reports it
        elif line.strip() or (block and whole):
            start = start if block else number
            block.append(line)
            size += len(line)


def _read_jsonl(path: Path, columns: list[str] | None) -> Iterator[Record | BadRecord]:
    yield from _json(path, is_array=False)


def _json(path: Path, is_array: bool) -> Iterator[Record | BadRecord]:
    """Yield the elements of an array; else the values, each on a line or, if the first one is so, over several."""
    with open_text(path) as file:
        if not is_array and not spreads(beginning(path)):
            yield from _json_lines(path, file)
            return
        for line, value in elements(file) if is_array else values(file):
            where = f"{path}:{line}"
            yield bad(where, value.reason, value.raw) if isinstance(value, Malformed) else Record(where, value)


def _json_lines(path: Path, file: TextIO) -> Iterator[Record | BadRecord]:
    lines = _lines(file)
    for number in itertools.count(1):
        line = next(lines, "")
        where = f"{path}:{number}"
        if not line:
            return
        if len(line) == MAX_CHARS and not line.endswith("\n"):
            yield bad(where, f"a line longer than {MAX_CHARS} characters", line)
            while line and not line.endswith("\n"):  # skip the rest of this line
                line = next(lines, "")
        elif line.strip():
            try:
                yield Record(where, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield bad(where, "; ".join(filter(None, [f"not JSON: {error}", not_utf8(line)])), line)


def _read_json(path: Path, columns: list[str] | None) -> Iterator[Record | BadRecord]:
    yield from _json(path, is_array=beginning(path).lstrip().startswith("["))


_READERS: dict[str, Callable[[Path, list[str] | None], Iterator[Record | BadRecord]]] = {
    "txt": _read_txt,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "csv": read_csv,
    "tsv": partial(read_csv, delimiter="\t"),
    "parquet": read_parquet,
}


# --- from records to documents ----------------------------------------------------------------------------------


def to_documents(
    stream: Iterable[Record | BadRecord], text_of: Callable[[Any], str], source: str, held_out: bool | None = None
) -> Iterator[Document | BadRecord]:
    """Yield a Document with `text_of(value)` for each record, or a BadRecord where that fails or is not Unicode."""
    for record in stream:
        if isinstance(record, BadRecord):
            yield record
            continue
        try:
            text = text_of(record.value)
            if not isinstance(text, str):
                raise TypeError(f"the text should be a string, found {type(text).__name__}")
            if reason := not_utf8(text):
                raise ValueError(reason)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
            yield bad(record.where, reason, str(record.value))
        else:
            yield Document(text, source, held_out)


def text_under(key: str) -> Callable[[Any], str]:
    """Return a function that reads the text of a value: the value itself if a string, or a dict's entry `key`."""

    def text_of(value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, dict):
            raise TypeError(f"expected a text or an object with the key {key!r}, found {type(value).__name__}")
        if key not in value:
            raise ValueError(f"no key {key!r} (set by --text_key); the keys are {', '.join(map(repr, value))}")
        return value[key]

    return text_of


def read_files(path: Path, text_key: str, form: str = "auto") -> Iterator[Document | BadRecord]:
    """Yield every document of a file or of the files in a folder; their source is the name of `path`.

    Raises the errors of `find_files` at once, before the first document.
    """
    read = (records(file, [text_key], form) for file in find_files(path))
    streams = (to_documents(stream, text_under(text_key), path.name) for stream in read)
    return itertools.chain.from_iterable(streams)


def read_loader(path: Path, text_key: str) -> Iterator[Document | BadRecord]:
    """Yield every document from the `data_loader()` of the Python file `path`, which yields strings or dicts.

    Raises FileNotFoundError at once when there is no such file. An error inside the loader is an error of a program
    and not a bad record: it ends the iteration with a ValueError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--loader {path}: no such file; expected a Python file with a data_loader() generator")
    return to_documents(loader_records(path), text_under(text_key), path.name)


def loader_records(path: Path) -> Iterator[Record]:
    """Yield each value from the `data_loader()` of a Python file; raises ValueError when the loader raises anything."""
    count = 0
    try:
        spec = importlib.util.spec_from_file_location("user_data_loader", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for value in module.data_loader():
            count += 1
            yield Record(f"{path}:{count}", value)
    except Exception as error:
        raise ValueError(f"the loader {path} failed after {count} records: {type(error).__name__}: {error}") from error

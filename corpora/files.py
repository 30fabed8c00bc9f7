"""Read the user's own texts: files and folders in the usual formats, and a Python file with a generator.

Formats: txt, json (an array, or one value per line), jsonl, csv, tsv, parquet; all but parquet also as .gz or .zst.
Everything streams in bounded memory. A record that cannot be read becomes a BadRecord that names its file and line.

- txt: if the first megabyte contains blank lines, they separate documents; otherwise each line is a document.
- csv: commas, quotes as in RFC 4180; tsv: tabs, no quotes. Both begin with a header row.
- A file without suffix is read as JSON lines if it begins with `{`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib.util
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from corpora.json_array import CHUNK, MAX_CHARS, Malformed, elements
from corpora.registry import RAW_CHARS, BadRecord, Document

FORMATS = ("txt", "json", "jsonl", "ndjson", "csv", "tsv", "parquet")
PACKED = ("gz", "zst")
UNPACKED_RATIO = 3  # estimate: compressed Chinese, English and JSON text grows to 2.5 to 4 times its size
_EXPECTED = f"{', '.join(FORMATS)} (plain, .gz or .zst)"
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, pa.ArrowException, UnicodeDecodeError)


class Record(NamedTuple):
    """One record of a file and its place: the value is a str (txt), a dict (csv, parquet) or any JSON value."""

    where: str
    value: Any


def bad(where: str, reason: str, raw: str) -> BadRecord:
    """Return a BadRecord; its raw text is cut, and escaped where it is not UTF-8, so that it can be written."""
    return BadRecord(where, reason, raw[:RAW_CHARS].encode("utf8", "backslashreplace").decode())


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


def records(path: Path, columns: list[str] | None = None) -> Iterator[Record | BadRecord]:
    """Yield every record of one file. Raises ValueError for a file of unknown format.

    columns: the only columns to read from a parquet file; a csv or parquet file without one of them is a BadRecord.
    """
    place = str(path)
    read = _reader(path)
    try:
        for record in read(path, columns):
            place = record.where
            yield record
    except _BROKEN as error:
        yield bad(place, f"the file is broken after this place: {error}", "")


def _reader(path: Path) -> Callable[[Path, list[str] | None], Iterator[Record | BadRecord]]:
    if format_of(path) is None:
        raise ValueError(f"{path}: its name shows no known format; expected {_EXPECTED}")
    return _READERS[format_of(path)]


def _open_text(path: Path, newline: str = "\n") -> TextIO:
    """Open a file as text: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Bytes that are not UTF-8 are read as lone surrogates; `to_documents` reports them later.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        stream = gzip.GzipFile(path, "rb")
    elif suffix == ".zst":
        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
    else:
        stream = path.open("rb", buffering=0)
    stream = io.BufferedReader(stream)
    if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return io.TextIOWrapper(stream, encoding="utf-16", errors="surrogatepass", newline=newline)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _lines(file: TextIO) -> Iterator[str]:
    """Yield lines with their line ends; a line longer than MAX_CHARS comes in pieces of that size."""
    return iter(lambda: file.readline(MAX_CHARS), "")


def _read_txt(path: Path, columns: list[str] | None) -> Iterator[Record]:
    with _open_text(path) as file:
        has_blocks = re.search(r"\n\s*\n", file.read(CHUNK).strip())
    with _open_text(path) as file:
        numbered = enumerate(_lines(file), 1)
        if has_blocks:
            yield from _blocks(path, numbered)
        else:
            yield from (Record(f"{path}:{n}", line.rstrip("\r\n")) for n, line in numbered if line.strip())


def _blocks(path: Path, numbered: Iterable[tuple[int, str]]) -> Iterator[Record]:
    """Yield the lines between blank lines as one record.

    A record ends at MAX_CHARS characters, too: otherwise a file without further blank lines would fill the memory.
    """
    block, start, size = [], 1, 0
    for number, line in itertools.chain(numbered, [(0, "")]):
        if block and (not line.strip() or size + len(line) > MAX_CHARS):
            yield Record(f"{path}:{start}", "".join(block).rstrip("\r\n"))
            block, size = [], 0
        if line.strip():
            start = start if block else number
            block.append(line)
            size += len(line)


def _read_jsonl(path: Path, columns: list[str] | None) -> Iterator[Record | BadRecord]:
    with _open_text(path) as file:
        yield from _json_lines(path, file)


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
                yield bad(where, f"not JSON: {error}", line)


def _read_json(path: Path, columns: list[str] | None) -> Iterator[Record | BadRecord]:
    with _open_text(path) as file:
        is_array = file.read(CHUNK).lstrip().startswith("[")
    with _open_text(path) as file:
        if not is_array:
            yield from _json_lines(path, file)
            return
        for line, value in elements(file):
            where = f"{path}:{line}"
            yield bad(where, value.reason, value.raw) if isinstance(value, Malformed) else Record(where, value)


def _read_csv(path: Path, columns: list[str] | None, **dialect: Any) -> Iterator[Record | BadRecord]:
    csv.field_size_limit(MAX_CHARS)
    with _open_text(path, newline="") as file:
        rows = csv.reader(_lines(file), strict=True, **dialect)
        header = None
        while True:
            where = f"{path}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield bad(where, f"not {format_of(path)}: {error}", "")
                continue
            if row is None:
                return
            if header is None:
                header = row
                if missing := [name for name in columns or () if name not in header]:
                    yield bad(where, _no_column(missing[0], header), ",".join(header))
                    return
            elif len(row) == len(header):
                yield Record(where, dict(zip(header, row)))
            elif row:
                yield bad(where, f"{len(row)} fields under a header of {len(header)}", ",".join(row))


def _read_tsv(path: Path, columns: list[str] | None) -> Iterator[Record | BadRecord]:
    return _read_csv(path, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path: Path, columns: list[str] | None) -> Iterator[Record | BadRecord]:
    # Read in batches of rows through a small buffer: one column of a row group may be gigabytes.
    with pq.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
        names = file.schema_arrow.names
        if missing := [name for name in columns or () if name not in names]:
            yield bad(f"{path}:1", _no_column(missing[0], names), "")
            return
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path}:{number}", row)


def _no_column(name: str, names: list[str]) -> str:
    return f"no column {name!r} (set by --text_key); the columns are {', '.join(map(repr, names))}"


_READERS: dict[str, Callable[[Path, list[str] | None], Iterator[Record | BadRecord]]] = {
    "txt": _read_txt,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
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
            text.encode("utf8")
        except UnicodeEncodeError as error:
            yield bad(record.where, _not_utf8(error), str(record.value))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
            yield bad(record.where, reason, str(record.value))
        else:
            yield Document(text, source, held_out)


def _not_utf8(error: UnicodeEncodeError) -> str:
    # U+DC80 to U+DCFF: a byte that is not UTF-8. Other surrogates: half a pair, written as an escape in JSON.
    is_byte = "\udc80" <= error.object[error.start] <= "\udcff"
    hint = "; convert the file, for instance with iconv -f gb18030 -t utf-8" if is_byte else ""
    return f"not UTF-8 at character {error.start + 1}{hint}"


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


def read_files(path: Path, text_key: str) -> Iterator[Document | BadRecord]:
    """Yield every document of a file or of the files in a folder; their source is the name of `path`.

    Raises the errors of `find_files` at once, before the first document.
    """
    streams = (to_documents(records(file, [text_key]), text_under(text_key), path.name) for file in find_files(path))
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

"""Read the rows of csv, tsv and parquet files as dicts, in bounded memory."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corpora.json_array import CHUNK, MAX_CHARS
from corpora.registry import BadRecord
from corpora.streams import Record, bad, open_text

_BATCH_BYTES, _BATCH_ROWS = 1 << 22, 256  # rows of parquet that are decoded at a time: up to the first of these limits
_NOT_HELD = (ValueError, OverflowError, TypeError)  # pyarrow, of a value that Python cannot hold; ArrowInvalid is one


# --- csv and tsv ------------------------------------------------------------------------------------------------


class _RowLines:
    """Lines for csv.reader. `begin` begins a row, which csv.Error ends where it is longer than MAX_CHARS characters."""

    def __init__(self, file: TextIO, quotes: bool) -> None:
        self.file, self.quotes = file, quotes
        self.line, self.piece = 0, ""
        self.begin()

    def begin(self) -> None:
        self.size = self.n_quotes = 0

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        self._read()
        if not self.piece:
            raise StopIteration
        if self.size >= MAX_CHARS:
            begins = self.line
            self._skip()
            raise csv.Error(f"a row longer than {MAX_CHARS} characters, with {self.line - begins} more lines skipped")
        return self.piece

    def _read(self) -> None:
        self.piece = self.file.readline(MAX_CHARS)
        self.size += len(self.piece)
        self.line += self.piece.endswith(("\n", "\r"))
        self.n_quotes += self.piece.count('"')

    def _skip(self) -> None:
        """Read to the end of the row: the end of a line where the number of quotes is even."""
        while self.piece and (not self.piece.endswith(("\n", "\r")) or (self.quotes and self.n_quotes % 2)):
            self._read()


def read_csv(path: Path, columns: list[str] | None, delimiter: str = ",") -> Iterator[Record | BadRecord]:
    """Yield the rows of a csv file; with a tab as `delimiter`, of a tsv file, which has no quotes."""
    kind, quoting = ("tsv", csv.QUOTE_NONE) if delimiter == "\t" else ("csv", csv.QUOTE_MINIMAL)
    csv.field_size_limit(2**31 - 1)  # _RowLines limits the rows
    with open_text(path, newline="") as file:
        lines = _RowLines(file, quotes=kind == "csv")
        rows = csv.reader(lines, strict=True, delimiter=delimiter, quoting=quoting)
        header = None
        while True:
            where = f"{path}:{lines.line + 1}"
            lines.begin()
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield bad(where, f"not {kind}: {error}", "")
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


def _no_column(name: str, names: list[str]) -> str:
    return f"no column {name!r} (set by --text_key); the columns are {', '.join(map(repr, names))}"


# --- parquet ----------------------------------------------------------------------------------------------------


def read_parquet(path: Path, columns: list[str] | None) -> Iterator[Record | BadRecord]:
    """Yield the rows of a parquet file; times and dates come as text, and null as None.

    Raises OSError and pyarrow's errors where the file is damaged.
    """
    # A small buffer: one column of a row group may be gigabytes.
    with pq.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        if missing := [name for name in columns or () if name not in names]:
            yield bad(f"{path}:1", _no_column(missing[0], names), "")
            return
        number = 0
        for group in range(file.metadata.num_row_groups):
            n_rows = _rows_at_a_time(file.metadata.row_group(group), columns)
            for batch in file.iter_batches(batch_size=n_rows, row_groups=[group], columns=columns):
                for row in _rows(batch):
                    number += 1
                    where = f"{path}:{number}"
                    yield bad(where, row, "") if isinstance(row, str) else Record(where, row)


def _rows_at_a_time(group: pq.RowGroupMetaData, columns: list[str] | None) -> int:
    """Return how many rows of a group have _BATCH_BYTES on average; at least 1 and at most _BATCH_ROWS."""
    chunks = (group.column(i) for i in range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in chunks if not columns or c.path_in_schema.split(".")[0] in columns)
    return min(max(_BATCH_BYTES * group.num_rows // max(size, 1), 1), _BATCH_ROWS)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Yield each row as a dict, or in words why Python cannot hold it."""
    if batch.nbytes <= MAX_CHARS and not any(pa.types.is_temporal(column.type) for column in batch.columns):
        with contextlib.suppress(*_NOT_HELD):  # quick, where no value is odd
            yield from batch.to_pylist()
            return
    for start in range(batch.num_rows):
        row = {}
        try:
            for name, column in zip(batch.schema.names, batch.columns):
                row[name] = _value(column, start)
        except _NOT_HELD as error:
            yield f"column {name!r}: {error}"
        else:
            yield row


def _value(column: pa.Array, at: int) -> Any:
    """Return one value of a column. Raises ValueError for a text above MAX_CHARS, as other formats have that limit."""
    if pa.types.is_temporal(column.type):  # years beyond 9999 and nanoseconds do not fit Python's datetime
        one = column.slice(at, 1)
        try:
            return one.cast(pa.string())[0].as_py()
        except pa.ArrowException:  # a time zone that nobody knows
            return one.cast(pa.int64()).cast(pa.string())[0].as_py()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        length = pc.utf8_length(column.slice(at, 1))[0].as_py() or 0
        if length > MAX_CHARS:
            raise ValueError(f"a text longer than {MAX_CHARS} characters, found {length}")
    return column[at].as_py()

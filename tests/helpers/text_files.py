"""Files of texts in every format that corpora/files.py reads."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from corpora.registry import BadRecord, Document

TEXTS = ["床前明月光，疑是地上霜。", 'She said "hi", twice', "a\tb", "第一行\n第二行", "😀 emoji", "", " spaces "]
ONE_LINE = [text for text in TEXTS if text.strip() and "\n" not in text]


def write(path: Path, texts: list[str]) -> Path:
    """`texts` as the suffix of `path` says, each written by the library that owns the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, rows = path.name.split(".")[1], [{"id": i, "text": text} for i, text in enumerate(texts)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    if kind == "csv":
        plain = path.with_name("plain")
        with plain.open("w", encoding="utf8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
        data = plain.read_bytes()
        plain.unlink()
    elif kind == "tsv":
        data = "\n".join(["id\ttext", *(f"{i}\t{text}" for i, text in enumerate(texts))]).encode()
    elif kind == "json":
        data = json.dumps(rows, indent=1).encode()
    elif kind == "jsonl":
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        data = "\n".join(texts).encode()
    pack = {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def split(stream) -> tuple[list[str], list[BadRecord]]:
    """The texts of a stream of documents, and its bad records."""
    found = list(stream)
    return [d.text for d in found if isinstance(d, Document)], [b for b in found if isinstance(b, BadRecord)]

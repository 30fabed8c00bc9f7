"""Megatron-LM's indexed datasets: ids in `name.bin`, and where they begin in `name.idx`.

The .idx, little-endian (megatron/core/datasets/indexed_dataset.py):

    b"MMIDIDX\\0\\0", uint64 1, uint8 code of the ids' dtype, uint64 sequences n, uint64 documents + 1
    int32 (n,)               ids of each sequence
    int64 (n,)               first byte of each sequence in the .bin
    int64 (documents + 1,)   first sequence of each document; the last value is n
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # 34 bytes
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats, which are no ids
_SCAN = 1 << 20


class Index(NamedTuple):
    """An .idx file, mapped."""

    dtype: np.dtype
    lengths: np.ndarray
    """ids of each sequence, (n,)"""
    pointers: np.ndarray
    """first byte of each sequence, (n,)"""
    documents: np.ndarray
    """first sequence of each document, (documents + 1,)"""


def read_index(path: Path) -> Index:
    """Map an .idx file. Raises ValueError where it is no such file, truncated, or contradicts itself or its .bin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path} is no index of Megatron: expected it to begin with MMIDIDX, found {head[:9]!r}")
    _, version, code, n, n_offsets = HEADER.unpack(head)
    if version != 1 or code not in CODES:
        raise ValueError(
            f"{path}: expected version 1 and a dtype of whole numbers (codes {', '.join(map(str, CODES))}), found "
            f"version {version} and code {code}"
        )
    expected = HEADER.size + 12 * n + 8 * n_offsets
    if n and size == expected + n:
        raise ValueError(f"{path} has a mode for each sequence: it is of texts with images, which cannot be read")
    if size != expected or n_offsets < 1:
        raise ValueError(f"{path}: expected {expected} bytes for {n} sequences, found {size}; copy it again")
    at = HEADER.size
    index = Index(
        np.dtype(CODES[code]),
        mapped(path, "<i4", at, n),
        mapped(path, "<i8", at + 4 * n, n),
        mapped(path, "<i8", at + 12 * n, n_offsets),
    )
    check_index(path, index)
    return index


def mapped(path: Path, dtype: str, offset: int, length: int) -> np.ndarray:
    """Map values of a file, read-only; an array without values cannot be mapped."""
    return np.asarray(np.memmap(path, dtype, "r", offset, (length,))) if length else np.zeros(0, dtype)


def check_index(path: Path, index: Index) -> None:
    """Raise ValueError where offsets do not rise, or the sequences are not exactly the bytes of the .bin."""
    data = path.with_suffix(".bin")
    found, item = data.stat().st_size, index.dtype.itemsize
    total = sum(int(index.lengths[part].sum(dtype=np.int64)) for part in parts(len(index.lengths))) * item
    if total != found:
        raise ValueError(f"{data}: expected {total} bytes ({path.name}), found {found}; copy it or make it again")
    damaged = index.documents[0] != 0 or index.documents[-1] != len(index.lengths)
    for part in parts(len(index.documents)):
        damaged |= bool((np.diff(index.documents[part.start : part.stop + 1]) < 0).any())
    for part in parts(len(index.lengths)):
        lengths, pointers = index.lengths[part].astype(np.int64), index.pointers[part]
        outside = (lengths < 0) | (pointers < 0) | (pointers > found - lengths * item) | (pointers % item != 0)
        damaged |= bool(outside.any())
    if damaged:
        raise ValueError(f"{path} is damaged: its offsets do not rise, or point outside of {data.name}; copy it again")


def read(path: Path) -> Iterator[np.ndarray]:
    """Yield the documents of a .bin file; a document may have no ids."""
    index = read_index(path.with_suffix(".idx"))
    item = index.dtype.itemsize
    ids = mapped(path, index.dtype.str, 0, path.stat().st_size // item)
    for at in range(0, len(index.documents) - 1, _SCAN):
        bounds = index.documents[at : at + _SCAN + 1].tolist()
        for first, last in itertools.pairwise(bounds):
            starts = (index.pointers[first:last] // item).tolist()
            parts = [ids[start : start + n] for start, n in zip(starts, index.lengths[first:last].tolist())]
            yield parts[0] if len(parts) == 1 else np.concatenate(parts or [ids[:0]])


class Writer:
    """Write documents to `prefix.bin` and `prefix.idx`, each document as one sequence; the files are whole after
    `close`. uint16 for vocabularies below 65500, else int32, as Megatron chooses them."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = np.dtype("<u2" if vocab_size < 65500 else "<i4")
        self.documents = 0
        self._bin = prefix.with_name(prefix.name + ".bin").open("wb")
        self._lengths = prefix.with_name(prefix.name + ".lengths").open("w+b")  # there may be more than memory holds

    def add(self, ids: np.ndarray) -> None:
        """Append one document, (n,) ids of the vocabulary."""
        self._bin.write(ids.astype(self.dtype).tobytes())
        self._lengths.write(struct.pack("<i", len(ids)))
        self.documents += 1

    def close(self) -> None:
        """Write the index."""
        self._bin.close()
        self._lengths.flush()
        n, code = self.documents, next(code for code, name in CODES.items() if np.dtype(name) == self.dtype)
        path = Path(self._lengths.name)
        lengths = mapped(path, "<i4", 0, n)
        with self.prefix.with_name(self.prefix.name + ".idx").open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, n, n + 1))
            for part in parts(n):
                file.write(lengths[part].tobytes())
            begin = 0
            for part in parts(n):
                ends = begin + np.cumsum(lengths[part].astype(np.int64)) * self.dtype.itemsize
                file.write(np.concatenate([[begin], ends[:-1]]).astype("<i8").tobytes())
                begin = int(ends[-1])
            for part in parts(n + 1):
                file.write(np.arange(part.start, part.stop).astype("<i8").tobytes())
        self._lengths.close()
        path.unlink()


def parts(n: int) -> Iterator[slice]:
    """Yield slices that cover n values, _SCAN at a time."""
    for at in range(0, n, _SCAN):
        yield slice(at, min(at + _SCAN, n))

"""Packed chunks of lit-gpt, TinyLlama and LitHFT: `prefix_0000000000.bin`, `prefix_0000000001.bin`, ...

A chunk, little-endian: b"LITPKDS", uint64 1, uint8 code of the ids' dtype, uint64 number of ids, the ids. Documents run
on from one chunk to the next. The last chunk of a prefix is filled up with the id that separates documents.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from bins.cut import cut, in_blocks, without_fill

MAGIC = b"LITPKDS"
HEADER = struct.Struct("<7sQBQ")  # 24 bytes
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats


def read_chunk(path: Path) -> np.ndarray:
    """Map the ids of a chunk. Raises ValueError where it is none, or truncated."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path} is no packed chunk: expected it to begin with LITPKDS, found {head[:7]!r}")
    _, version, code, n = HEADER.unpack(head)
    if version != 1 or code not in CODES:
        raise ValueError(
            f"{path}: expected version 1 and a dtype of whole numbers (codes {', '.join(map(str, CODES))}), found "
            f"version {version} and code {code}"
        )
    dtype = np.dtype(CODES[code])
    if size != HEADER.size + n * dtype.itemsize:
        raise ValueError(
            f"{path}: expected {HEADER.size + n * dtype.itemsize} bytes for {n} ids, found {size}; copy it again"
        )
    return np.asarray(np.memmap(path, dtype, "r", HEADER.size, (n,))) if n else np.zeros(0, dtype)


def read(paths: Iterable[Path], separator: int, before: bool) -> Iterator[np.ndarray]:
    """Yield the documents of the chunks of one prefix, given in order; separator, before: as in `cut`."""
    paths = list(paths)
    blocks = (block for path in paths for block in in_blocks(read_chunk(path)))
    yield from without_fill(cut(blocks, separator, paths[0], before), separator)


class Writer:
    """Write documents to chunks of `chunk_tokens` ids, the last one filled up with `fill`. uint16 for vocabularies
    below 65500, else int32, as lit-gpt chooses them."""

    def __init__(self, prefix: Path, vocab_size: int, fill: int, chunk_tokens: int) -> None:
        self.prefix, self.fill = prefix, fill
        self.dtype = np.dtype("<u2" if vocab_size < 65500 else "<i4")
        self.chunk = np.full(chunk_tokens, fill, self.dtype)
        self.used = self.chunks = 0

    def add(self, ids: np.ndarray) -> None:
        """Append one document, (n,) ids of the vocabulary."""
        while len(ids):
            part = ids[: len(self.chunk) - self.used]
            self.chunk[self.used : self.used + len(part)] = part
            self.used += len(part)
            ids = ids[len(part) :]
            if self.used == len(self.chunk):
                self._write()

    def close(self) -> None:
        """Write the last chunk."""
        if self.used or not self.chunks:
            self._write()

    def _write(self) -> None:
        code = next(code for code, name in CODES.items() if np.dtype(name) == self.dtype)
        with self.prefix.with_name(f"{self.prefix.name}_{self.chunks:010d}.bin").open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, len(self.chunk)))
            file.write(self.chunk.tobytes())
        self.chunk.fill(self.fill)
        self.used, self.chunks = 0, self.chunks + 1

"""Token bins: documents as ids on disk, mapped by readers, streamed by writers.

A bin is three files with one prefix:

    prefix.bin    the ids, documents one after another, little-endian uint16, or uint32 beyond 65536 entries
    prefix.idx    where documents begin, in tokens: uint64, documents + 1 values, the last one the number of tokens
    prefix.json   dtype, tokens, documents, eos_id, vocab_size, tokenizer_sha256, sources {name: documents}, text_bytes

A `.bin` alone, without the other two, is read as the headerless uint16 file of nanoGPT and baby-llama2.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

UINT16_IDS = 1 << 16  # a vocabulary of exactly 65536 still fits: its largest id is 65535
_SCAN = 1 << 24  # ids looked at per step when a headerless file is checked: 32 MB


class BinWriter:
    """Streams documents to `prefix.bin`, `.idx` and `.json`; they appear under these names on `close`, complete.

    As a context manager it closes at the end, or discards what it wrote when the block raises.
    Until then everything lies in `prefix.bin.part` and `prefix.idx.part`. What `state()` returned, given back as
    `state=`, goes on from there after a crash: whatever was written since is cut off, even if it was closed.

    Raises ValueError when `dtype` cannot hold `vocab_size` ids.
    """

    def __init__(
        self,
        prefix: Path | str,
        vocab_size: int,
        eos_id: int,
        tokenizer_sha256: str,
        dtype: Any = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        if dtype is None:
            dtype = np.uint16 if vocab_size <= UINT16_IDS else np.uint32
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            raise ValueError(f"token bins hold uint16 or uint32, not {np.dtype(dtype).name}")
        if vocab_size > 1 << (8 * self.dtype.itemsize):
            raise ValueError(f"a vocabulary of {vocab_size} does not fit {self.dtype.name}: use uint32")
        if not 0 <= eos_id < vocab_size:
            raise ValueError(f"eos_id {eos_id} lies outside the vocabulary of {vocab_size}")
        self.prefix = Path(prefix)
        self.vocab_size, self.eos_id, self.tokenizer_sha256 = vocab_size, eos_id, tokenizer_sha256
        state = state or {"tokens": 0, "documents": 0, "text_bytes": 0, "sources": {}}
        self.tokens, self.documents, self.text_bytes = state["tokens"], state["documents"], state["text_bytes"]
        self.sources = Counter(state["sources"])
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        if self.documents:
            self._unname()
        self._bin = open_at(self._part(".bin"), self.tokens * self.dtype.itemsize)
        self._idx = open_at(self._part(".idx"), (self.documents + 1) * 8 if self.documents else 0)
        if not self.documents:
            self._idx.write(bytes(8))  # the first document begins at token 0

    def add(self, ids: Sequence[int] | np.ndarray, source: str = "", text_bytes: int = 0) -> None:
        """Append one document: its ids, the last of them `eos_id`, the name it is counted under and its UTF-8 length.

        Raises ValueError, before a byte of the document is written, when an id lies outside the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"a document is a flat, non-empty list of ids, found {ids.dtype} of shape {ids.shape}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"id {wrong} of document {self.documents} lies outside the vocabulary of {self.vocab_size}"
            )
        if ids[-1] != self.eos_id:
            raise ValueError(f"document {self.documents} ends with id {ids[-1]}, expected eos_id {self.eos_id}")
        self._bin.write(ids.astype(self.dtype).tobytes())
        self.tokens += ids.size
        self.documents += 1
        self.text_bytes += text_bytes
        self.sources[source] += 1
        self._idx.write(self.tokens.to_bytes(8, "little"))

    def state(self) -> dict[str, Any]:
        """Put what was added so far safely on disk; the dict, which JSON can hold, goes on from here as `state=`."""
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
        return {key: self._meta()[key] for key in ("tokens", "documents", "text_bytes", "sources")}

    def close(self) -> None:
        """Give the files their names. A kill in between leaves something `TokenBin` refuses, never a mixture."""
        self.state()
        self._bin.close()
        self._idx.close()
        meta = self._part(".json")
        # A file name that is not Unicode may stand among the sources: escaped, which JSON reads as it was.
        meta.write_bytes(json.dumps(self._meta(), ensure_ascii=False, indent=2).encode("utf8", "backslashreplace"))
        # The json seals the set: it goes first when an older set is replaced, and comes last.
        self._name(".json").unlink(missing_ok=True)
        for suffix in (".idx", ".bin", ".json"):
            self._part(suffix).replace(self._name(suffix))

    def discard(self) -> None:
        """Remove what was written; a finished bin of the same name stays as it was."""
        self._bin.close()
        self._idx.close()
        for suffix in (".bin", ".idx", ".json"):
            self._part(suffix).unlink(missing_ok=True)

    def __enter__(self) -> BinWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _meta(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "eos_id": self.eos_id,
            "vocab_size": self.vocab_size,
            "tokenizer_sha256": self.tokenizer_sha256,
            "sources": dict(self.sources),
            "text_bytes": self.text_bytes,
        }

    def _unname(self) -> None:
        self._name(".json").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            if not self._part(suffix).exists() and self._name(suffix).exists():
                self._name(suffix).replace(self._part(suffix))

    def _name(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def _part(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix + ".part")


def open_at(path: Path, size: int) -> BinaryIO:
    """A file to go on writing at `size` bytes; what an interrupted run wrote beyond is cut off.

    Raises ValueError when there are fewer.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise ValueError(f"cannot go on with {path}: {size} bytes were written, {found} are left")
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


class TokenBin:
    """A bin on disk, mapped read-only. Pickles by its path, so every process maps it anew.

    `tokens` (n,) np.memmap of uint16 or uint32; `offsets` (documents + 1,) uint64, where document i is
    `tokens[offsets[i] : offsets[i + 1]]` with its eos, or None for a headerless uint16 file; `meta` the
    dict of `prefix.json`, `{}` for a headerless file; `len()` the number of tokens.

    Raises FileNotFoundError, and ValueError when the three files do not agree (a truncated copy).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no token bin at {self.path}; data_process.py makes them")
        index, header = self.path.with_suffix(".idx"), self.path.with_suffix(".json")
        self.meta: dict[str, Any] = {}
        self.offsets: np.ndarray | None = None
        if header.is_file():
            self._read_described(index, header)
        elif index.is_file():
            raise ValueError(f"{self.path} has an .idx but no .json: its writing was interrupted; make it again")
        else:
            size = self.path.stat().st_size
            if size % 2:
                raise ValueError(
                    f"{self.path} holds {size} bytes, not whole uint16 ids: it is truncated or no token bin"
                )
            self.tokens = _map(self.path, np.dtype("<u2"), size // 2)

    def _read_described(self, index: Path, header: Path) -> None:
        try:
            self.meta = json.loads(header.read_text(encoding="utf8"))
            dtype, n_tokens, n_documents = np.dtype(self.meta["dtype"]), self.meta["tokens"], self.meta["documents"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{header} does not describe a token bin ({error!r}); make it again") from error
        for path, expected in ((self.path, n_tokens * dtype.itemsize), (index, (n_documents + 1) * 8)):
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                raise ValueError(f"{path} holds {found} bytes, {header.name} says {expected}: copy or make it again")
        self.tokens = _map(self.path, dtype.newbyteorder("<"), n_tokens)
        self.offsets = _map(index, np.dtype("<u8"), n_documents + 1)
        if self.offsets[0] != 0 or self.offsets[-1] != n_tokens:
            raise ValueError(f"{index} ends at token {self.offsets[-1]}, {header.name} says {n_tokens}: make it again")

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[type[TokenBin], tuple[Path]]:
        return TokenBin, (self.path,)

    def check(self, tokenizer_sha256: str, vocab_size: int) -> None:
        """Raise ValueError when the bin was made by another tokenizer, or, headerless, holds ids beyond `vocab_size`
        (its tokenizer is not known, so its ids are looked at, once)."""
        if not self.meta:
            highest = max((int(self.tokens[at : at + _SCAN].max()) for at in range(0, len(self), _SCAN)), default=0)
            if highest >= vocab_size:
                raise ValueError(
                    f"{self.path} holds id {highest}, the tokenizer has {vocab_size}: it was made by another"
                )
        elif self.meta["vocab_size"] != vocab_size or self.meta["tokenizer_sha256"] != tokenizer_sha256:
            raise ValueError(
                f"{self.path} was made by another tokenizer: vocabulary {self.meta['vocab_size']}, sha256 "
                f"{self.meta['tokenizer_sha256'][:12]}, this one has {vocab_size}, {tokenizer_sha256[:12]}; "
                f"run data_process.py with this tokenizer"
            )


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """`length` values of a file, read-only; an empty file cannot be mapped and is an empty array."""
    return np.memmap(path, dtype, "r", shape=(length,)) if length else np.zeros(0, dtype)

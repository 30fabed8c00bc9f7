"""Token bins: documents as token ids on disk. Writers stream them, readers map them into memory.

A bin is three files with the same prefix:

    prefix.bin    ids of all documents in order, little-endian uint16, or uint32 for vocabularies above 65536
    prefix.idx    first token of each document, uint64, documents + 1 values; the last one is the number of tokens
    prefix.json   dtype, tokens, documents, bos (ids before the text of every document), eos_id, vocab_size,
                  tokenizer_sha256, sources {name: documents}, runs [[name, documents], ...] (the same in the order
                  of the documents), text_bytes; SHA-256 of the other two files: sha256 (of prefix.bin, as
                  `sha256sum` prints it) and idx_sha256

A `.bin` without the other two files is read as the headerless uint16 file of nanoGPT and baby-llama2.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cli.progress import say

UINT16_IDS = 1 << 16  # number of ids that fit uint16: the largest is 65535
_SCAN = 1 << 24  # ids, or bytes to hash, that are read at a time
VERIFIED_BYTES = 1 << 29  # SHA-256 takes about two seconds a gigabyte: files up to this size are always verified


class BinWriter:
    """Stream documents to `prefix.bin`, `.idx` and `.json`, which appear under these names on `close`, complete.

    As a context manager it closes at the end, or discards its files when the block raises an exception.
    Until `close` the data lies in `prefix.bin.part` and `prefix.idx.part`. To continue after a crash, pass the dict
    that `state()` returned as `state`: documents written after that call are cut off, even if the bin was closed.

    Raises ValueError when `dtype` cannot hold `vocab_size` ids, or `eos_id` is outside the vocabulary.
    """

    def __init__(
        self,
        prefix: Path | str,
        vocab_size: int,
        eos_id: int,
        tokenizer_sha256: str,
        dtype: Any = None,
        state: dict[str, Any] | None = None,
        bos: Sequence[int] = (),
    ) -> None:
        if dtype is None:
            dtype = np.uint16 if vocab_size <= UINT16_IDS else np.uint32
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            raise ValueError(f"the dtype of a token bin should be uint16 or uint32, found {np.dtype(dtype).name}")
        if vocab_size > 1 << (8 * self.dtype.itemsize):
            raise ValueError(f"a vocabulary of {vocab_size} does not fit {self.dtype.name}: use uint32")
        if not 0 <= eos_id < vocab_size:
            raise ValueError(f"eos_id should be from 0 to {vocab_size - 1} (vocab_size - 1), found {eos_id}")
        self.prefix = Path(prefix)
        self.vocab_size, self.eos_id, self.tokenizer_sha256 = vocab_size, eos_id, tokenizer_sha256
        self.bos = list(bos)
        state = state or {"tokens": 0, "documents": 0, "text_bytes": 0, "sources": {}}
        self.tokens, self.documents, self.text_bytes = state["tokens"], state["documents"], state["text_bytes"]
        self.sources = Counter(state["sources"])
        # states of versions without runs: sources are read one after the other
        self.runs = [list(run) for run in state.get("runs", state["sources"].items())]
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        if self.documents:
            self._reopen()
        # .bin: 2 or 4 bytes per token; .idx: 8 bytes per document, and 8 for the zero at its start
        self._bin = open_at(self._part(".bin"), self.tokens * self.dtype.itemsize)
        self._idx = open_at(self._part(".idx"), (self.documents + 1) * 8 if self.documents else 0)
        self._hashes = {file: hash_of(Path(file.name), file.tell()) for file in (self._bin, self._idx)}
        if not self.documents:
            self._write(self._idx, bytes(8))  # the first document begins at token 0

    def add(self, ids: Sequence[int] | np.ndarray, source: str = "", text_bytes: int = 0) -> None:
        """Append one document.

        ids: (n,) integers, the last one `eos_id`; source: name for the counts; text_bytes: size of the text in UTF-8.
        Raises ValueError, before anything is written, when an id is outside the vocabulary or eos is missing.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"a document should be a flat, non-empty list of ids, found {ids.dtype} of shape {ids.shape}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:  # astype would wrap around such ids without an error
            wrong = low if low < 0 else high
            raise ValueError(
                f"id {wrong} of document {self.documents} is outside the vocabulary of {self.vocab_size} ids"
            )
        if ids[-1] != self.eos_id:
            raise ValueError(f"document {self.documents} ends with id {ids[-1]}, expected eos_id {self.eos_id}")
        self._write(self._bin, ids.astype(self.dtype).tobytes())
        self.tokens += ids.size
        self.documents += 1
        self.text_bytes += text_bytes
        self.sources[source] += 1
        if not self.runs or self.runs[-1][0] != source:
            self.runs.append([source, 0])
        self.runs[-1][1] += 1
        self._write(self._idx, self.tokens.to_bytes(8, "little"))

    def _write(self, file: BinaryIO, data: bytes) -> None:
        file.write(data)
        self._hashes[file].update(data)

    def state(self) -> dict[str, Any]:
        """Flush all documents to the disk and return a dict for JSON; pass it as `state` to continue from here."""
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
        return {key: self._meta()[key] for key in ("tokens", "documents", "text_bytes", "sources", "runs")}

    def sums(self) -> dict[str, list]:
        """Return the bytes and the SHA-256 of all that was written, by the names of the files until `close`."""
        return {Path(file.name).name: [file.tell(), self._hashes[file].hexdigest()] for file in (self._bin, self._idx)}

    def close(self) -> None:
        """Rename the files to their final names. After a kill in between, `TokenBin` refuses the incomplete set."""
        self.state()
        self._bin.close()
        self._idx.close()
        meta = self._part(".json")
        # Names of sources may be file names that are not Unicode; escaped, JSON reads them back unchanged.
        meta.write_bytes(json.dumps(self._meta(), ensure_ascii=False, indent=2).encode("utf8", "backslashreplace"))
        # The .json marks a complete set: remove an older one first, and write the new one last.
        self._name(".json").unlink(missing_ok=True)
        for suffix in (".idx", ".bin", ".json"):
            self._part(suffix).replace(self._name(suffix))

    def discard(self) -> None:
        """Remove the unfinished files; a finished bin of the same name stays unchanged."""
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
            "bos": self.bos,
            "eos_id": self.eos_id,
            "vocab_size": self.vocab_size,
            "tokenizer_sha256": self.tokenizer_sha256,
            "sources": dict(self.sources),
            "runs": self.runs,
            "text_bytes": self.text_bytes,
            "sha256": self._hashes[self._bin].hexdigest(),
            "idx_sha256": self._hashes[self._idx].hexdigest(),
        }

    def _reopen(self) -> None:
        """Undo `close`: rename finished files back to `.part`, so that more documents can be added."""
        self._name(".json").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            if not self._part(suffix).exists() and self._name(suffix).exists():
                self._name(suffix).replace(self._part(suffix))

    def _name(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def _part(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix + ".part")


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a file for writing at byte `size`; bytes beyond, from an interrupted run, are cut off.

    Raises ValueError when the file is shorter.
    """
    actual = path.stat().st_size if path.exists() else 0
    if actual < size:
        raise ValueError(
            f"{path}: expected at least {size} bytes from the interrupted run, found {actual}; "
            "delete its folder and start again"
        )
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


class TokenBin:
    """A bin on disk, mapped read-only. It is pickled as its path, so that every process maps the file itself.

    tokens: (n,) np.memmap of uint16 or uint32; `len()` returns n.
    offsets: (documents + 1,) uint64; document i, with its eos, is `tokens[offsets[i] : offsets[i + 1]]`. None for a
        headerless file.
    meta: dict from `prefix.json`; {} for a headerless file.

    Raises FileNotFoundError, and ValueError when the three files do not agree, as after an incomplete copy.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such token bin; make it with data_process.py")
        index, header = self.path.with_suffix(".idx"), self.path.with_suffix(".json")
        self.meta: dict[str, Any] = {}
        self.offsets: np.ndarray | None = None
        self._sha256: str | None = None  # of a bin whose .json does not have it
        if header.is_file():
            self._read_described(index, header)
        elif index.is_file():
            raise ValueError(f"{self.path} has an .idx but no .json: it is incomplete; make it again")
        else:
            size = self.path.stat().st_size
            if size % 2:
                raise ValueError(
                    f"{self.path}: expected uint16 ids of 2 bytes, found {size} bytes; it is truncated or no token bin"
                )
            self.tokens = _map(self.path, np.dtype("<u2"), size // 2)

    def _read_described(self, index: Path, header: Path) -> None:
        try:
            self.meta = json.loads(header.read_text(encoding="utf8"))
            dtype, n_tokens, n_documents = np.dtype(self.meta["dtype"]), self.meta["tokens"], self.meta["documents"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{header} does not describe a token bin ({error!r}); make it again") from error
        for path, expected in ((self.path, n_tokens * dtype.itemsize), (index, (n_documents + 1) * 8)):
            actual = path.stat().st_size if path.is_file() else 0
            if actual != expected:
                raise ValueError(
                    f"{path}: expected {expected} bytes ({header.name}), found {actual}; copy it or make it again"
                )
        self.tokens = _map(self.path, dtype.newbyteorder("<"), n_tokens)
        self.offsets = _map(index, np.dtype("<u8"), n_documents + 1)
        if self.offsets[0] != 0 or self.offsets[-1] != n_tokens:
            raise ValueError(
                f"{index}: expected {n_tokens} tokens ({header.name}), found {self.offsets[-1]}; make it again"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def sha256(self) -> str:
        """Return the SHA-256 of the .bin file, which says what it holds: from its .json, or of the file if not there.

        Bins of older versions and headerless bins do not store it: their file is read, once for each TokenBin.
        """
        if "sha256" not in self.meta and self._sha256 is None:
            self._sha256 = hash_of(self.path).hexdigest()
        return self.meta.get("sha256") or self._sha256

    def parts(self) -> list[tuple[str, int, int]]:
        """Return (source, first token, end) of each stretch of documents of one source, in order.

        A bin that does not say where its sources lie is one stretch, with the names of all; a headerless one has its
        own name.
        """
        if self.offsets is None:
            return [(self.path.name, 0, len(self))]
        names = list(self.meta.get("sources", {})) or [self.path.name]
        runs = self.meta.get("runs") or [[", ".join(names), self.meta["documents"]]]
        ends = np.cumsum([0, *(documents for _, documents in runs)])
        tokens = np.asarray(self.offsets)[ends.clip(max=len(self.offsets) - 1)].tolist()
        return [(name, *span) for (name, _), *span in zip(runs, tokens, tokens[1:])]

    def __reduce__(self) -> tuple[type[TokenBin], tuple[Path]]:
        return TokenBin, (self.path,)

    @property
    def bos(self) -> list[int]:
        """The ids before the text of every document; none in bins of versions that did not write them."""
        return self.meta.get("bos") or []

    def check(self, tokenizer_sha256: str, vocab_size: int, begins: Sequence[int] = (), verify: bool = False) -> None:
        """Raise ValueError when the bin was made with another tokenizer, or its files changed after they were written;
        say so when its documents do not begin with the ids `begins` of the tokenizer.

        All ids and the index are read. The SHA-256 of both files is compared with the .json, too, where they have up to
        VERIFIED_BYTES; `verify`: also of larger ones. A headerless bin does not name its tokenizer and has no hash.
        """
        if self.meta and (self.meta["vocab_size"] != vocab_size or self.meta["tokenizer_sha256"] != tokenizer_sha256):
            raise ValueError(
                f"{self.path} was made with another tokenizer: expected vocabulary {vocab_size}, sha256 "
                f"{tokenizer_sha256[:12]}, found {self.meta['vocab_size']}, {self.meta['tokenizer_sha256'][:12]}; "
                f"run data_process.py with this tokenizer"
            )
        highest = max((int(self.tokens[at : at + _SCAN].max()) for at in range(0, len(self), _SCAN)), default=0)
        if highest >= vocab_size:
            cause = "it is damaged" if self.meta else "it was made with another tokenizer"
            raise ValueError(
                f"{self.path} holds id {highest}, but the tokenizer has {vocab_size} ids: "
                f"{cause}; run data_process.py with this tokenizer"
            )
        if self.offsets is not None and not _rises(self.offsets):
            raise ValueError(
                f"{self.path.with_suffix('.idx')}: expected offsets that rise from document to document, found one "
                "that does not: it is damaged; copy it again, or make it again"
            )
        for path, key in ((self.path, "sha256"), (self.path.with_suffix(".idx"), "idx_sha256")):
            asked = key in self.meta and (verify or path.stat().st_size <= VERIFIED_BYTES)
            if asked and hash_of(path).hexdigest() != self.meta[key]:
                raise ValueError(
                    f"{path}: its SHA-256 is not the one that its .json holds, so it changed after it was written; "
                    "copy it again, or make it again"
                )
        if self.meta and self.bos != list(begins):
            say(
                f"{self.path}: its documents begin with the ids {self.bos}, and a text of this tokenizer with "
                f"{list(begins)}: losses differ from those of the model's own texts; make it again with data_process.py"
            )


def find_bins(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a name in a folder, or else in the folders in it: a corpus may have been made in parts."""
    return sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))


def _rises(offsets: np.ndarray) -> bool:
    """Return whether each offset is above the one before; reads _SCAN of them at a time."""
    parts = (offsets[at : at + _SCAN + 1] for at in range(0, len(offsets), _SCAN))
    return all(bool((part[1:] > part[:-1]).all()) for part in parts)


def hash_of(path: Path, size: int | None = None) -> Any:
    """Return hashlib's SHA-256 of the first `size` bytes of a file; None: of all of them."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(_SCAN, left))):
            digest.update(data)
            left -= len(data)
    return digest


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """Map `length` values of a file, read-only; returns an empty array for an empty file, which cannot be mapped."""
    return np.memmap(path, dtype, "r", shape=(length,)) if length else np.zeros(0, dtype)

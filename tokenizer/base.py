"""What all tokenizers have in common: special tokens, ids to bytes, a directory that transformers reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken

SPACE = "\u2581"  # SentencePiece's sign for a space
MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # special tokens of our chat template
SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")  # keys of tokenizer_config.json


class Tokenizer:
    """Text to ids and back. `load_tokenizer` returns one; each subclass reads one kind of file.

    vocab_size: number of ids
    bos_id, eos_id, pad_id, unk_id: ids of these special tokens, None where the model has none
    begins: ids that stand before every text, usually [bos_id] or none; see `ids_before_text`
    special: piece -> id of all special tokens; no text encodes to them, except to `unk_id`
    added: tokens that are not special, but one id wherever a text has them: added ones, user-defined pieces
    strips: special tokens that remove white space beside them -> (on the left, on the right)
    dummy_prefix: whether the model puts a space before every text, which `decode` removes
    chat_template: Jinja text from the tokenizer's directory, written again by `save`; or texts by name, or None
    """

    def __init__(self, pieces: list[bytes], special: dict[str, int], ids: Iterable[int | None]) -> None:
        self.vocab_size = len(pieces)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = ids
        self.special = special
        self.begins: list[int] = []
        self.chat_template: str | dict[str, str] | None = None
        self.added: tuple[str, ...] = ()
        self.strips: dict[str, tuple[bool, bool]] = {}
        self._pieces = pieces  # id -> its bytes
        self._lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._special_names = {i: piece for piece, i in special.items()}
        self.dummy_prefix = b"".join(map(self.id_to_bytes, self.encode("a"))).startswith(b" ")
        if unsafe := [piece for piece, i in special.items() if i != self.unk_id and i in self.encode(piece)]:
            raise ValueError(f"this tokenizer's model reads {', '.join(unsafe)} in plain text as special tokens")

    def encode(self, text: str, follows_special: bool = False) -> list[int]:
        """Return the ids of plain text, without `begins` and eos. Raises ValueError for a lone surrogate.

        follows_special: the text comes after a special token. Some vocabularies put a space before the first text only.
        """
        try:
            return self._encode(text, follows_special)
        except (RuntimeError, TypeError):  # raised by the libraries for a surrogate
            text.encode()  # raises UnicodeEncodeError, a ValueError, which names the character
            raise

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of `encode` for each text, (n,) whole numbers. SentencePiece is faster with many texts."""
        return [np.array(self.encode(text), np.int64) for text in texts]

    def encode_spans(self, text: str, follows_special: bool = False) -> tuple[list[int], np.ndarray]:
        """Return the ids of `encode` and the characters of `text` that each covers: (n, 2) int64, start and stop."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Write a directory for `load_tokenizer` and transformers; raises ValueError as `to_tokenizers` does."""
        config, files = self._files()
        config.pop("chat_template", None)
        if isinstance(self.chat_template, dict):
            named = [{"name": name, "template": text} for name, text in self.chat_template.items()]
            config["chat_template"] = named
        elif self.chat_template:
            config["chat_template"] = self.chat_template
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(directory, name).write_bytes(content)

    def guarding(self, names: Iterable[str]) -> Tokenizer:
        """Return a copy in which these of `added` are special: no text encodes to them. It serves to encode only."""
        raise NotImplementedError

    def _encode(self, text: str, follows_special: bool) -> list[int]:
        raise NotImplementedError

    def _files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return the content of tokenizer_config.json, and the other files by name."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of `ids`, with U+FFFD for bytes that are not UTF-8.

        skip_special: leave out special tokens; False writes their names.
        """
        raw = (self.id_to_bytes(i) or ("" if skip_special else self._special_names.get(i, "")).encode() for i in ids)
        text = b"".join(raw).decode("utf8", errors="replace")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

    def id_to_bytes(self, i: int) -> bytes:
        """Return the bytes of one id, which may be a part of a character; b"" for special tokens, and for ids beyond
        the vocabulary, to which the rows of padding of an embedding belong."""
        if i < 0:
            raise ValueError(f"a token id should be 0 or more, found {i}")
        return self._pieces[i] if i < self.vocab_size else b""

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id, (vocab_size,) int64; 0 for special tokens."""
        return self._lengths.copy()

    def special_names(self) -> dict[str, str]:
        """Return the names of those of bos, eos, pad and unk that exist, under the keys of tokenizer_config.json."""
        ids = zip(SPECIAL_KEYS, (self.bos_id, self.eos_id, self.pad_id, self.unk_id))
        return {key: self._special_names[i] for key, i in ids if i in self._special_names}

    def ids_before_text(self, config: dict[str, Any]) -> list[int]:
        """Return the ids that stand before every text; config: that of tokenizer_config.json. As in transformers."""
        raise NotImplementedError

    def special_id(self, piece: str) -> int | None:
        """Return the id of a special token by its name, None if there is no such special token."""
        return self.special.get(piece)

    def sha256(self) -> str:
        """Return the hex SHA-256 of the bytes and names of all ids; the same for every file format."""
        table = [(self._special_names.get(i), piece) for i, piece in enumerate(self._pieces)]
        return hashlib.sha256(repr(table).encode()).hexdigest()


def piece_bytes(piece: str, is_byte: bool) -> bytes:
    """Return the bytes of a SentencePiece piece; is_byte: it is the name of one byte, such as <0x0A>."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()


def strips(tokens: Iterable[AddedToken]) -> dict[str, tuple[bool, bool]]:
    """Return those special tokens that remove white space beside them -> (on the left, on the right)."""
    return {t.content: (t.lstrip, t.rstrip) for t in tokens if t.special and (t.lstrip or t.rstrip)}

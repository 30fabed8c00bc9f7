"""Tokenizers from a `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from tokenizer.base import SPECIAL_KEYS, Tokenizer, piece_bytes, strips
from tokenizer.config import read_added_tokens, read_config


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer from a `tokenizer.json`, with bos, eos and pad from the `tokenizer_config.json` beside it."""

    def __init__(self, path: Path) -> None:
        self._json = path.read_text(encoding="utf8")
        self._config = read_config(path.parent)
        model = path.with_name("tokenizer.model")
        self._model = model.read_bytes() if model.is_file() else None  # only copied by `save`, for llama.cpp and others
        try:
            self._backend = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer.json that the tokenizers library can read: {error}") from None
        self._backend.encode_special_tokens = True  # encode special tokens in a text as text
        self._backend.no_truncation()
        self._backend.no_padding()
        if not isinstance(self._backend.model, models.BPE):
            raise ValueError(f"{path}: expected a BPE model, found {type(self._backend.model).__name__}")
        self._add_missing(path.parent)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        unk = self._config["unk_token"] or self._backend.model.unk_token
        if unk in vocab:
            special[unk] = vocab[unk]
        to_bytes = _bytes_of_decoder(json.loads(self._json)["decoder"], path)
        table = [b""] * (max(vocab.values()) + 1)
        for piece, i in vocab.items():
            if piece not in special:
                table[i] = piece.encode() if i in added else to_bytes(piece)
        names = [self._config[key] for key in SPECIAL_KEYS[:3]] + [unk]
        self._following = self._backend_after_special()
        super().__init__(table, special, [vocab.get(name) for name in names])
        self.strips = strips(added.values())
        self.added = tuple(token.content for token in added.values() if token.content not in special)
        self.chat_template, self.begins = self._config.get("chat_template"), self.ids_before_text(self._config)

    def _add_missing(self, directory: Path) -> None:
        """Add the tokens that only the other files in the directory name, as transformers does."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        missing = {i: t for i, t in read_added_tokens(directory, self._config).items() if t.content not in vocab}
        for i, token in missing.items():
            (self._backend.add_special_tokens if token.special else self._backend.add_tokens)([token])
            if (found := self._backend.token_to_id(token.content)) != i:
                raise ValueError(
                    f"{directory}: tokenizer_config.json or added_tokens.json gives {token.content!r} the id {i}, "
                    f"and the next free id of tokenizer.json is {found}; correct the one or the other"
                )
        if missing:
            self._json = self._backend.to_str()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # pickling loses this setting
        self._following = self._backend_after_special()

    def _backend_after_special(self) -> tokenizers.Tokenizer:
        """Return the backend for text after a special token: without the space that "first" puts before a text."""
        settings = json.loads(self._json)
        split = settings["pre_tokenizer"] or {}
        spaces = [step for step in split.get("pretokenizers", [split]) if step.get("prepend_scheme") == "first"]
        if not spaces:
            return self._backend
        for step in spaces:
            step["prepend_scheme"] = "never"
        backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        return backend

    def ids_before_text(self, config: dict[str, Any]) -> list[int]:
        # The post-processor decides alone: beside a tokenizer.json, transformers ignores add_bos_token.
        plain, whole = (self._backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])

    def _encode(self, text: str, follows_special: bool) -> list[int]:
        return self._backend_for(follows_special).encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str, follows_special: bool = False) -> tuple[list[int], np.ndarray]:
        encoding = self._backend_for(follows_special).encode(text, add_special_tokens=False)
        return encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def _backend_for(self, follows_special: bool) -> tokenizers.Tokenizer:
        return self._following if follows_special else self._backend

    def _files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        config = {key: value for key, value in self._config.items() if value is not None}
        files = {"tokenizer.json": self._json.encode()} | ({"tokenizer.model": self._model} if self._model else {})
        # Other classes of transformers build their own pre-tokenizer; this one takes tokenizer.json as it is.
        return config | {"tokenizer_class": "PreTrainedTokenizerFast"}, files


def _bytes_of_decoder(decoder: dict[str, Any] | None, path: Path) -> Callable[[str], bytes]:
    """Return the function from a piece to its bytes, according to the decoder in a `tokenizer.json`."""
    kinds = {step["type"] for step in (decoder.get("decoders", [decoder]) if decoder else [])}
    if "ByteLevel" in kinds:
        # GPT-2's bytes_to_unicode: a printable Latin-1 byte is that character, the others are U+0100 and following.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        byte_of = {chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
        byte_of |= {chr(b): b for b in printable}
        return lambda piece: bytes(byte_of[c] for c in piece) if byte_of.keys() >= set(piece) else piece.encode()
    if kinds & {"Metaspace", "ByteFallback"}:
        byte = re.compile(r"<0x[0-9A-F]{2}>" if "ByteFallback" in kinds else r"(?!)")
        return lambda piece: piece_bytes(piece, byte.fullmatch(piece) is not None)
    names = ", ".join(sorted(kinds)) or "none"
    raise ValueError(f"{path}: expected a decoder ByteLevel, Metaspace or ByteFallback, found {names}")

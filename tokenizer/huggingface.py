"""Tokenizers from a `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from tokenizer.base import SPECIAL_KEYS, Tokenizer, piece_bytes, strips
from tokenizer.config import check_id, read_added_tokens, read_config
from tokenizer.cutting import PART, find_boundary, inner_settings, parts_of
from tokenizer.unigram import ids_of_pieces, unknown_piece


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer from a `tokenizer.json`, with bos, eos and pad from the `tokenizer_config.json` beside it."""

    def __init__(self, path: Path) -> None:
        self._json = read_text(path)
        self._config = read_config(path.parent)
        model = path.with_name("tokenizer.model")
        self._model = model.read_bytes() if model.is_file() else None  # only copied by `save`, for llama.cpp and others
        self._add_missing(path)
        self._read(path, set())

    def _read(self, path: Path, guarded: set[str]) -> None:
        """Make the tables and backends from `self._json`, in which `guarded` tokens count as special, too.

        path: for errors. The tokens that the config names (bos, eos, pad) are special, whatever their flag.
        """
        settings = read_settings(self._json, path)
        guarded |= {self._config[key] for key in SPECIAL_KEYS} - {None}
        for token in settings["added_tokens"]:
            token["special"] = token["special"] or token["content"] in guarded
        self._backend = make_backend(settings, path)
        if not isinstance(self._backend.model, models.BPE | models.Unigram):
            raise ValueError(f"{path}: expected a BPE or Unigram model, found {type(self._backend.model).__name__}")
        vocab = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        unk = self._config["unk_token"] or unknown_piece(settings["model"])
        if unk in vocab:
            special[unk] = vocab[unk]
        to_bytes = _bytes_of_decoder(settings, path)
        table = [b""] * (max(vocab.values(), default=-1) + 1)
        for piece, i in vocab.items():
            if piece not in special:
                table[i] = piece.encode() if i in added else to_bytes(piece)
        names = [self._config[key] for key in SPECIAL_KEYS[:3]] + [unk]
        self._inner: tokenizers.Tokenizer | None = None  # for all parts of a long text but the first
        self._following = make_backend(settings, path) if without_first_space(settings) else self._backend
        super().__init__(table, special, [vocab.get(name) for name in names])
        self.strips = strips(added.values())
        self.added = tuple(token.content for token in added.values() if token.content not in special)
        self.chat_template, self.begins = self._config.get("chat_template"), self.ids_before_text(self._config)

    @property
    def text(self) -> str:
        """The content of the `tokenizer.json`."""
        return self._json

    @property
    def model(self) -> bytes | None:
        """The bytes of the `tokenizer.model` beside the `tokenizer.json`; None where there is none."""
        return self._model

    def guarding(self, names: Iterable[str]) -> HuggingFaceTokenizer:
        other = copy.copy(self)
        other._read(Path("tokenizer.json"), set(names))
        return other

    def _add_missing(self, path: Path) -> None:
        """Add the tokens that only the other files in the directory name, as transformers does."""
        settings = read_settings(self._json, path)
        known = ids_of_pieces(settings["model"]).keys() | {token["content"] for token in settings["added_tokens"]}
        beside = read_added_tokens(path.parent, self._config)
        missing = {i: token for i, token in beside.items() if token.content not in known}
        if not missing:
            return
        backend = make_backend(settings, path)
        for i, token in missing.items():
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            if (found := backend.token_to_id(token.content)) != i:
                raise ValueError(
                    f"{path.parent}: tokenizer_config.json or added_tokens.json gives {token.content!r} the id {i}, "
                    f"and the next free id of tokenizer.json is {found}; correct the one or the other"
                )
        self._json = backend.to_str()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._inner = None
        for backend in (self._backend, self._following):
            backend.encode_special_tokens = True  # pickling loses this setting

    def ids_before_text(self, config: dict[str, Any]) -> list[int]:
        # The post-processor decides alone: beside a tokenizer.json, transformers ignores add_bos_token.
        plain, whole = (self._backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])

    def _encode(self, text: str, follows_special: bool) -> list[int]:
        parts = self._encodings(text, follows_special)
        return list(chain.from_iterable(encoding.ids for _, encoding in parts))

    def encode_spans(self, text: str, follows_special: bool = False) -> tuple[list[int], np.ndarray]:
        ids, spans = [], []
        for start, encoding in self._encodings(text, follows_special):
            ids += encoding.ids
            spans.append(np.array(encoding.offsets, np.int64).reshape(-1, 2) + start)
        return ids, np.concatenate(spans)

    def _encodings(self, text: str, follows_special: bool) -> Iterator[tuple[int, tokenizers.Encoding]]:
        """Yield the encodings of the parts of a text, and where each part begins."""
        backend = self._following if follows_special else self._backend
        if len(text) < 2 * PART:
            yield 0, backend.encode(text, add_special_tokens=False)
            return
        if self._inner is None:  # made when the first long text comes, and kept
            settings = json.loads(self._backend.to_str())
            self._boundary = find_boundary(settings, self._backend)
            self._inner = make_backend(inner_settings(settings), Path("tokenizer.json"))
        for start, part in parts_of(text, self._boundary):
            yield start, (self._inner if start else backend).encode(part, add_special_tokens=False)

    def _files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        config = {key: value for key, value in self._config.items() if value is not None}
        files = {"tokenizer.json": self._json.encode()} | ({"tokenizer.model": self._model} if self._model else {})
        # Other classes of transformers build their own pre-tokenizer; this one takes tokenizer.json as it is.
        return config | {"tokenizer_class": "PreTrainedTokenizerFast"}, files


def read_text(path: Path) -> str:
    """Return the text of a file; ValueError names one that is not UTF-8."""
    try:
        return path.read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_settings(text: str, path: Path) -> dict[str, Any]:
    """Return the contents of a tokenizer.json with all parts that are read here; ValueError where one is damaged."""
    try:
        settings = json.loads(text)
        model, added = settings["model"], settings.get("added_tokens") or []
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
            raise ValueError("it has no model with a vocab")
        if model.get("type", "BPE") not in ("BPE", "Unigram"):
            raise ValueError(f"expected a BPE or Unigram model, found {model['type']}")
        if prefix := model.get("continuing_subword_prefix"):  # the library panics on some
            raise ValueError(f"pieces with a continuing_subword_prefix, {prefix!r:.50} (WordPiece), are not supported")
        if unnamed := [token for token in added if not isinstance(token["content"], str)]:
            raise ValueError(f"an added token without content: {unnamed[0]!r:.100}")
        for i in (max(ids_of_pieces(model).values(), default=0), *(token["id"] for token in added)):
            check_id(i, path)
        return settings | {"added_tokens": [{"special": False} | token for token in added]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer.json that can be read here: {error}") from None


def make_backend(settings: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    """Return the library's tokenizer, which reads special tokens in a text as text and neither cuts nor pads."""
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        backend.encode("a")
    except BaseException as error:  # the library raises nothing narrower; its panics are not even an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{path} is not a tokenizer.json that the tokenizers library can read: {error}") from None
    return backend


def without_first_space(settings: dict[str, Any]) -> bool:
    """Take the space that "first" puts before a text out of a tokenizer.json, for a text after a special token.

    Returns whether there was one.
    """
    split = settings.get("pre_tokenizer") or {}
    spaces = [step for step in split.get("pretokenizers", [split]) if step.get("prepend_scheme") == "first"]
    for step in spaces:
        step["prepend_scheme"] = "never"
    return bool(spaces)


def _bytes_of_decoder(settings: dict[str, Any], path: Path) -> Callable[[str], bytes]:
    """Return the function from a piece to its bytes, according to the decoder in a `tokenizer.json`."""
    decoder = settings.get("decoder")
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

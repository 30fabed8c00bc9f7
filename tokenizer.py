"""Tokenizers: convert text to ids and back, with one interface for all files of vocabularies.

- `.model`: SentencePiece BPE (ours, LLaMA's, ChatGLM2's).
- `tokenizer.json`: byte-level or SentencePiece-style BPE of the `tokenizers` library (Llama 3, Qwen, SmolLM).

All tokenizers guarantee three things:

- Special tokens written in a text are text: `encode("</s>")` never returns the id of `</s>`, so that a user's text
  cannot end a turn.
- `id_to_bytes` is exact: the bytes of `encode(text)` join to the text again. A streamer can therefore hold back half a
  character, and a loss can be measured in bits per byte.
- `save` writes a directory from which transformers reads a tokenizer with the same ids.

"Text" above means the text that the model sees: after its normalisation (NFC, NFKC, spaces removed), if it has one;
with a space at the beginning, if it has a `dummy_prefix` (LLaMA, ChatGLM2); without characters that it does not know
and cannot write as bytes; and with a space for U+2581, which SentencePiece uses as its sign for a space.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, decoders, models, normalizers, processors

SPACE = "\u2581"  # SentencePiece's sign for a space
MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # special tokens of our chat template
SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")  # keys of tokenizer_config.json
# ChatGLM2 adds five pieces after those of its SentencePiece model. Only the size of the model identifies its file.
CHATGLM2_PIECES = 64789
CHATGLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class Tokenizer:
    """Text to ids and back. `load_tokenizer` returns one; each subclass reads one kind of file.

    vocab_size: number of ids
    bos_id, eos_id, pad_id, unk_id: ids of these special tokens, None where the model has none
    begins: ids that stand before every text, usually [bos_id] or none; see `ids_before_text`
    special: piece -> id of all special tokens; no text encodes to them, except to `unk_id`
    strips: special tokens that remove white space beside them -> (on the left, on the right)
    dummy_prefix: whether the model puts a space before every text, which `decode` removes
    chat_template: Jinja text from the tokenizer's directory, written again by `save`; or several by name, or None
    """

    def __init__(self, pieces: list[bytes], special: dict[str, int], ids: Iterable[int | None]) -> None:
        self.vocab_size = len(pieces)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = ids
        self.special = special
        self.begins: list[int] = []
        self.chat_template: Any = None
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

    def encode_spans(self, text: str, follows_special: bool = False) -> tuple[list[int], np.ndarray]:
        """Return the ids of `encode` and the characters of `text` that each covers: (n, 2) int64, start and stop."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Write a directory for `load_tokenizer` and transformers; raises ValueError as `to_tokenizers` does."""
        config, files = self._files()
        if self.chat_template:
            config["chat_template"] = self.chat_template
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(directory, name).write_bytes(content)

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


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer from the bytes of a SentencePiece `.model`; `name` is used in errors.

    Raises ValueError when the bytes are not such a model.
    """

    def __init__(self, model: bytes, name: str | Path = "the model") -> None:
        proto = ModelProto()
        with contextlib.suppress(DecodeError):
            proto.ParseFromString(model)
        if not proto.HasField("normalizer_spec"):  # the last field of the file: a truncated file may still parse
            raise ValueError(f"{name} is not a SentencePiece model (damaged, truncated, or a git-lfs pointer)")
        special = {p.piece: i for i, p in enumerate(proto.pieces) if p.type in (p.CONTROL, p.UNKNOWN)}
        table = [b"" if p.piece in special else _piece_bytes(p.piece, p.type == p.BYTE) for p in proto.pieces]
        self._processor = sp = SentencePieceProcessor(model_proto=model)
        ids = [None if i < 0 else i for i in (sp.bos_id(), sp.eos_id(), sp.pad_id(), sp.unk_id())]
        if len(table) == CHATGLM2_PIECES:
            special |= {piece: i for i, piece in enumerate(CHATGLM2_SPECIAL, start=len(table))}
            table += [b""] * len(CHATGLM2_SPECIAL)
            ids[2] = sp.unk_id()  # ChatGLM2 pads with <unk>
        super().__init__(table, special, ids)

    def _encode(self, text: str, follows_special: bool) -> list[int]:
        return self._processor.encode(text)

    def ids_before_text(self, config: dict[str, Any]) -> list[int]:
        # Without a word in the config, a model with bos is LLaMA's, whose tokenizer writes it, unless the directory is
        # one of `save`, or the vocabulary one of ours or ChatGLM2's.
        ours = "tokenizer_model_of" in config or all(marker in self.special for marker in MARKERS)
        wanted = config.get("add_bos_token", not ours and "sop" not in self.special)
        return [self.bos_id] if wanted and self.bos_id is not None else []

    def encode_spans(self, text: str, follows_special: bool = False) -> tuple[list[int], np.ndarray]:
        # Count the bytes of the pieces: exact for every model that does not normalise the text; no chat model does.
        ids = self.encode(text)
        raw = np.frombuffer(text.encode(), np.uint8)
        char_of = np.cumsum((raw & 0xC0) != 0x80) - 1  # (bytes,) index of its character; 10xxxxxx continues one
        lengths = self._lengths[ids]
        stops = np.cumsum(lengths) - self.dummy_prefix  # (n,) end of each token in bytes, without the added space
        # first and last byte of each token; clipped, because the added space has no byte in the text
        first, last = (np.clip(at, 0, len(raw) - 1) for at in (stops - lengths, stops - 1))
        return ids, np.stack((char_of[first], char_of[last] + 1), axis=1)

    def _files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        model = self._processor.serialized_model_proto()
        fast = to_tokenizers(ModelProto.FromString(model), self.special)
        config: dict[str, Any] = self.special_names() | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.begins:
            bos = config["bos_token"]
            fast.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, self.bos_id)])
            config["add_bos_token"] = True
        same = fast.to_str().encode()
        # load_tokenizer compares this hash and reads the .model, which is faster, if tokenizer.json is unchanged.
        config["tokenizer_model_of"] = hashlib.sha256(same).hexdigest()
        return config, {"tokenizer.model": model, "tokenizer.json": same}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer from a `tokenizer.json`, with bos, eos and pad from the `tokenizer_config.json` beside it."""

    def __init__(self, path: Path) -> None:
        self._json = path.read_text(encoding="utf8")
        self._config = _read_config(path.parent)
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
        self.strips = {t.content: (t.lstrip, t.rstrip) for t in added.values() if t.special and (t.lstrip or t.rstrip)}

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
        return {"tokenizer_class": "PreTrainedTokenizerFast"} | config, files


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer from a directory, a `.model` file or a `tokenizer.json`.

    In a directory with both files, `tokenizer.json` decides, as in transformers: it may contain tokens added later.
    Raises FileNotFoundError if there is no tokenizer, ValueError if it is damaged or of an unknown kind.
    """
    path = Path(path)
    if path.is_dir():
        model, path = path / "tokenizer.model", path / "tokenizer.json"
        written_for = _read_config(path.parent).get("tokenizer_model_of")
        if model.is_file() and (not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() == written_for):
            path = model
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer (and no .model there); train one with train_tokenizer.py")
    is_json = path.suffix == ".json"
    tokenizer = HuggingFaceTokenizer(path) if is_json else SentencePieceTokenizer(path.read_bytes(), path)
    config = _read_config(path.parent)
    tokenizer.chat_template, tokenizer.begins = config.get("chat_template"), tokenizer.ids_before_text(config)
    return tokenizer


def _read_config(directory: Path) -> dict[str, Any]:
    """Read `tokenizer_config.json` and the files that older and newer versions of transformers write beside it.

    Special tokens come as their names, or None.
    """
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            config |= json.loads((directory / name).read_text(encoding="utf8"))
    if (directory / "chat_template.jinja").is_file():
        config["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf8")
    for key in SPECIAL_KEYS:
        token = config.get(key)
        config[key] = token["content"] if isinstance(token, dict) else token
    return config


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()


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
        return lambda piece: _piece_bytes(piece, byte.fullmatch(piece) is not None)
    names = ", ".join(sorted(kinds)) or "none"
    raise ValueError(f"{path}: expected a decoder ByteLevel, Metaspace or ByteFallback, found {names}")


def to_tokenizers(proto: ModelProto, special: dict[str, int]) -> tokenizers.Tokenizer:
    """Convert a SentencePiece BPE model to a tokenizer of the `tokenizers` library with the same ids for every text.

    SentencePiece repeatedly joins the two neighbours whose joined piece has the best score, leftmost first. A merge
    table does the same if it lists every pair of pieces that join to a piece, sorted by that piece's score.
    (One difference: with NFKC, the library drops a combining mark after a ligature; SentencePiece keeps it.)
    Raises ValueError for models that a merge table cannot express: unigram, user-defined pieces, spaces as suffixes.
    """
    spec, norm = proto.trainer_spec, proto.normalizer_spec
    odd = spec.treat_whitespace_as_suffix or any(p.type == p.USER_DEFINED for p in proto.pieces)
    if spec.model_type != TrainerSpec.BPE or odd or not norm.escape_whitespaces:
        raise ValueError("only SentencePiece BPE models without user-defined pieces can be written as tokenizer.json")
    score = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    # merge table: all ways to split each piece into two pieces, best score first
    pairs = [(w[:i], w[i:]) for w in score for i in range(1, len(w)) if w[:i] in score and w[i:] in score]
    pairs.sort(key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0])))
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)} | special
    unk = next(p.piece for p in proto.pieces if p.type == p.UNKNOWN)
    model = models.BPE(vocab, pairs, unk_token=unk, byte_fallback=spec.byte_fallback, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    # normalisation as SentencePiece does it: character map, spaces removed, space added in front, spaces escaped
    steps = [normalizers.Precompiled(norm.precompiled_charsmap)] if norm.precompiled_charsmap else []
    if norm.remove_extra_whitespaces:
        steps += [normalizers.Replace(tokenizers.Regex(old), new) for old, new in ((r"\A +| +\z", ""), (" {2,}", " "))]
    steps += [normalizers.Prepend(SPACE)] * norm.add_dummy_prefix + [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back + [decoders.Strip(" ", 1, 0)] * norm.add_dummy_prefix)
    # ChatGLM2's added pieces are not in this list: transformers would find "sop" inside the word "philosophy".
    inside = (piece for piece, i in special.items() if i < len(proto.pieces))
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in inside])
    return tokenizer

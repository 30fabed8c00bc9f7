"""Tokenizers: text <-> ids behind one interface, whatever file the vocabulary came from.

- `.model`: SentencePiece BPE, ours, LLaMA's and ChatGLM2's.
- `tokenizer.json`: any byte-level or SentencePiece-style BPE of the `tokenizers` library (Llama 3, Qwen, SmolLM).

Three promises hold for all of them. Special tokens written in a text are text: `encode("</s>")` never gives the id
of `</s>`, so nobody can end a turn from inside it. `id_to_bytes` is exact: over `encode(text)` the bytes join to the
text again, so a streamer can hold back half a character and a loss can be counted in bits per byte. And `save` writes
a directory from which transformers reads the same ids.

Bytes and text are those the model sees: after its normalisation (NFC, NFKC, spaces dropped), where it has one; with a
space before every text, if it has a `dummy_prefix` (LLaMA, ChatGLM2); without characters it does not know and cannot
spell in bytes; and with a space for U+2581, because that is how SentencePiece writes one.
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
from tokenizers import AddedToken, decoders, models, normalizers

SPACE = "\u2581"  # SentencePiece's written form of a space
MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATES = Path(__file__).parent / "chat" / "templates"
SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")  # as tokenizer_config.json calls them
# ChatGLM2 puts five pieces behind the SentencePiece model; nothing but its size tells its file from another's.
CHATGLM2_PIECES = 64789
CHATGLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class Tokenizer:
    """Text <-> ids; `load_tokenizer` makes one. Subclasses read a kind of file.

    Attributes: `vocab_size` (ids are below it); `bos_id`, `eos_id`, `pad_id`, `unk_id` (int, or None where the model
    has none); `special` (piece -> id; text never gives one, unless it is unknown); `strips` (special tokens that take
    white space beside them: whether to the left, whether to the right); `dummy_prefix` (the model puts a space before
    every text and `decode` takes it away); `chat_template` (what came in its directory and `save` writes: a Jinja text,
    several by name, or None, for which `save` writes our own if the vocabulary has its markers).
    """

    def __init__(self, pieces: list[bytes], special: dict[str, int], ids: Iterable[int | None]) -> None:
        self.vocab_size = len(pieces)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = ids
        self.special = special
        self.chat_template: Any = None
        self.strips: dict[str, tuple[bool, bool]] = {}
        self._pieces = pieces  # id -> the bytes it stands for
        self._lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._special_names = {i: piece for piece, i in special.items()}
        self.dummy_prefix = b"".join(map(self.id_to_bytes, self.encode("a"))).startswith(b" ")
        if forged := [piece for piece, i in special.items() if i != self.unk_id and i in self.encode(piece)]:
            raise ValueError(f"this tokenizer's model reads {', '.join(forged)} in plain text as special tokens")

    def encode(self, text: str, follows_special: bool = False) -> list[int]:
        """Ids of plain text, without bos or eos. Raises ValueError for a lone surrogate, which has no UTF-8 form.

        `follows_special`: it comes after a special token; some vocabularies put their space before the first text only.
        """
        try:
            return self._encode(text, follows_special)
        except (RuntimeError, TypeError):  # what the libraries say of it
            text.encode()  # names the character
            raise

    def encode_spans(self, text: str, follows_special: bool = False) -> tuple[list[int], np.ndarray]:
        """The ids of `encode`, and of each the characters of `text` it stands for: (n, 2) int64 of starts and stops."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Write what `load_tokenizer` and transformers read the same ids from; ValueError as in `to_tokenizers`."""
        config, files = self._files()
        if self.chat_template:
            config["chat_template"] = self.chat_template
        elif all(marker in self.special for marker in MARKERS):
            config["chat_template"] = (TEMPLATES / "ours.jinja").read_text(encoding="utf8").rstrip("\n")
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(directory, name).write_bytes(content)

    def _encode(self, text: str, follows_special: bool) -> list[int]:
        raise NotImplementedError

    def _files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What goes into tokenizer_config.json, and the other files by name."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 come as U+FFFD. Special tokens are left out or written by name."""
        raw = (self.id_to_bytes(i) or ("" if skip_special else self._special_names.get(i, "")).encode() for i in ids)
        text = b"".join(raw).decode("utf8", errors="replace")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text

    def id_to_bytes(self, i: int) -> bytes:
        """The bytes that one id stands for, perhaps half a character; b"" for special tokens."""
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self._pieces[i]

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: the number of UTF-8 bytes each id stands for, 0 for special tokens."""
        return self._lengths.copy()

    def special_names(self) -> dict[str, str]:
        """The names of bos, eos, pad and unk, as far as there are, under the keys of tokenizer_config.json."""
        ids = zip(SPECIAL_KEYS, (self.bos_id, self.eos_id, self.pad_id, self.unk_id))
        return {key: self._special_names[i] for key, i in ids if i in self._special_names}

    def special_id(self, piece: str) -> int | None:
        """The id of a special token by its name, None when there is no such special token."""
        return self.special.get(piece)

    def sha256(self) -> str:
        """Hex identity of what the ids mean (the bytes and names of all of them), the same for every file format."""
        table = [(self._special_names.get(i), piece) for i, piece in enumerate(self._pieces)]
        return hashlib.sha256(repr(table).encode()).hexdigest()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`, given as its bytes; `name` is for messages. Raises ValueError when it is none."""

    def __init__(self, model: bytes, name: str | Path = "the model") -> None:
        proto = ModelProto()
        with contextlib.suppress(DecodeError):
            proto.ParseFromString(model)
        if not proto.HasField("normalizer_spec"):  # the last of its parts: a file cut short may still parse
            raise ValueError(f"{name} is not a SentencePiece model (damaged, cut short, or a git-lfs pointer)")
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

    def encode_spans(self, text: str, follows_special: bool = False) -> tuple[list[int], np.ndarray]:
        # By the bytes of the pieces: exact for every model that leaves the text as it is, as all chat models do.
        ids = self.encode(text)
        raw = np.frombuffer(text.encode(), np.uint8)
        char_of = np.cumsum((raw & 0xC0) != 0x80) - 1  # (bytes,): those that go on with a character are 10xxxxxx
        lengths = self._lengths[ids]
        stops = np.cumsum(lengths) - self.dummy_prefix
        first, last = (np.clip(at, 0, len(raw) - 1) for at in (stops - lengths, stops - 1))
        return ids, np.stack((char_of[first], char_of[last] + 1), axis=1)

    def _files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        model = self._processor.serialized_model_proto()
        same = to_tokenizers(ModelProto.FromString(model), self.special).to_str().encode()
        config = self.special_names() | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        # By this, load_tokenizer takes the .model, which is faster, for as long as the two say the same.
        config["tokenizer_model_of"] = hashlib.sha256(same).hexdigest()
        return config, {"tokenizer.model": model, "tokenizer.json": same}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; bos, eos, pad and the chat template come from `tokenizer_config.json` beside it."""

    def __init__(self, path: Path) -> None:
        self._json = path.read_text(encoding="utf8")
        self._config = _read_config(path.parent)
        model = path.with_name("tokenizer.model")
        self._model = model.read_bytes() if model.is_file() else None  # kept for those who want it, such as llama.cpp
        try:
            self._backend = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer.json that the tokenizers library can read: {error}") from None
        self._backend.encode_special_tokens = True  # special tokens in a text are text
        self._backend.no_truncation()
        self._backend.no_padding()
        if not isinstance(self._backend.model, models.BPE):
            raise ValueError(f"{path} holds a {type(self._backend.model).__name__} model: only BPE is known here")
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
        self._backend.encode_special_tokens = True  # which pickling forgets
        self._following = self._backend_after_special()

    def _backend_after_special(self) -> tokenizers.Tokenizer:
        """The same for text that follows a special token: there, a "first" space does not come."""
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
    """The tokenizer of a directory, a `.model` file or a `tokenizer.json`.

    Of a directory with both, `tokenizer.json` counts, as for transformers: it may hold tokens added later.
    Raises FileNotFoundError when there is none, ValueError when it is damaged or of a kind not known here.
    """
    path = Path(path)
    if path.is_dir():
        model, path = path / "tokenizer.model", path / "tokenizer.json"
        written_for = _read_config(path.parent).get("tokenizer_model_of")
        if model.is_file() and (not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() == written_for):
            path = model
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path} (nor a .model there); train one with train_tokenizer.py")
    is_json = path.suffix == ".json"
    tokenizer = HuggingFaceTokenizer(path) if is_json else SentencePieceTokenizer(path.read_bytes(), path)
    tokenizer.chat_template = _read_config(path.parent).get("chat_template")
    return tokenizer


def _read_config(directory: Path) -> dict[str, Any]:
    """`tokenizer_config.json` and the files older and newer writers put beside it, special tokens by name or None."""
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
    """The function from a piece to its bytes that a `tokenizer.json`'s decoder stands for."""
    kinds = {step["type"] for step in (decoder.get("decoders", [decoder]) if decoder else [])}
    if "ByteLevel" in kinds:
        # GPT-2's bytes_to_unicode: printable Latin-1 stands for itself, the other bytes for U+0100 onwards in order.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        byte_of = {chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
        byte_of |= {chr(b): b for b in printable}
        return lambda piece: bytes(byte_of[c] for c in piece) if byte_of.keys() >= set(piece) else piece.encode()
    if kinds & {"Metaspace", "ByteFallback"}:
        byte = re.compile(r"<0x[0-9A-F]{2}>" if "ByteFallback" in kinds else r"(?!)")
        return lambda piece: _piece_bytes(piece, byte.fullmatch(piece) is not None)
    raise ValueError(f"{path} decodes with {kinds or 'nothing'}: it is neither byte-level nor SentencePiece-style")


def to_tokenizers(proto: ModelProto, special: dict[str, int]) -> tokenizers.Tokenizer:
    """A SentencePiece BPE model as one of the `tokenizers` library, with the same ids for every text.

    SentencePiece joins, of all neighbours that together are a piece, the pair with the best score, the leftmost first;
    a merge table says the same when it lists every pair of pieces that joins to a piece, in the order of that piece's
    score. (Of NFKC and its like, the library drops a combining mark after a ligature, and SentencePiece does not.)
    Raises ValueError for what cannot be said so: unigram models, user-defined pieces, spaces as suffixes.
    """
    spec, norm = proto.trainer_spec, proto.normalizer_spec
    odd = spec.treat_whitespace_as_suffix or any(p.type == p.USER_DEFINED for p in proto.pieces)
    if spec.model_type != TrainerSpec.BPE or odd or not norm.escape_whitespaces:
        raise ValueError("only SentencePiece BPE models without user-defined pieces can be written as tokenizer.json")
    score = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    pairs = [(w[:i], w[i:]) for w in score for i in range(1, len(w)) if w[:i] in score and w[i:] in score]
    pairs.sort(key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0])))
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)} | special
    unk = next(p.piece for p in proto.pieces if p.type == p.UNKNOWN)
    model = models.BPE(vocab, pairs, unk_token=unk, byte_fallback=spec.byte_fallback, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    steps = [normalizers.Precompiled(norm.precompiled_charsmap)] if norm.precompiled_charsmap else []
    if norm.remove_extra_whitespaces:
        steps += [normalizers.Replace(tokenizers.Regex(old), new) for old, new in ((r"\A +| +\z", ""), (" {2,}", " "))]
    steps += [normalizers.Prepend(SPACE)] * norm.add_dummy_prefix + [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back + [decoders.Strip(" ", 1, 0)] * norm.add_dummy_prefix)
    # Pieces outside the model (ChatGLM2's) stay out of this list: transformers would find "sop" inside "philosophy".
    inside = (piece for piece, i in special.items() if i < len(proto.pieces))
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in inside])
    return tokenizer

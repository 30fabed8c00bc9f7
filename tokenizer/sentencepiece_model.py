"""Tokenizers from a SentencePiece `.model`, and what the `tokenizers` library needs to read the same ids."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tokenizer.base import MARKERS, SPACE, SPECIAL_KEYS, Tokenizer, piece_bytes, strips
from tokenizer.config import to_plain
from tokenizer.unigram import check_ids, cut_names, unigram_model

# ChatGLM2 adds five pieces after those of its SentencePiece model. Only the size of the model identifies its file.
CHATGLM2_PIECES = 64789
CHATGLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer from the bytes of a SentencePiece `.model`; `name` is used in errors.

    config: the contents of the tokenizer_config.json beside it. Its names of special tokens count more than those of
    the model, and with `legacy: false` no space is put before a text that follows a special token.
    added: special tokens beside the model, by id: behind its pieces, or in place of a piece.

    Raises ValueError when the bytes are not such a model, or `added` does not fit it.
    """

    def __init__(
        self,
        model: bytes,
        name: str | Path = "the model",
        config: dict[str, Any] | None = None,
        added: Mapping[int, AddedToken] | None = None,
    ) -> None:
        proto, settings, self._beside = read_model(model, name), config or {}, dict(added or {})
        self._config = config
        ids_of = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        for i, token in self._beside.items():
            if (at := ids_of.get(token.content, i)) != i:
                raise ValueError(f"{name} has the piece {token.content!r} at {at}, and the files beside it say {i}")
            if i < len(proto.pieces):
                proto.pieces[i].piece = token.content
                if proto.pieces[i].type != ModelProto.SentencePiece.UNKNOWN:
                    proto.pieces[i].type = ModelProto.SentencePiece.CONTROL
        try:
            self._processor = sp = SentencePieceProcessor(model_proto=proto.SerializeToString())
        except RuntimeError as error:  # readable as a message, and no model
            raise ValueError(f"{name} is a damaged SentencePiece model: {error}") from None
        special = {p.piece: i for i, p in enumerate(proto.pieces) if p.type in (p.CONTROL, p.UNKNOWN)}
        table = [b"" if p.piece in special else piece_bytes(p.piece, p.type == p.BYTE) for p in proto.pieces]
        ids = [None if i < 0 else i for i in (sp.bos_id(), sp.eos_id(), sp.pad_id(), sp.unk_id())]
        if len(table) == CHATGLM2_PIECES:
            special |= {piece: i for i, piece in enumerate(CHATGLM2_SPECIAL, start=len(table))}
            ids[2] = sp.unk_id()  # ChatGLM2 pads with <unk>
        special |= {token.content: i for i, token in self._beside.items()}
        table += [b""] * (1 + max(special.values(), default=-1) - len(table))
        self.legacy = bool(settings.get("legacy", True)) or not proto.normalizer_spec.add_dummy_prefix
        proto.normalizer_spec.add_dummy_prefix &= self.legacy
        norm = proto.normalizer_spec
        self._normalises = bool(norm.precompiled_charsmap or norm.remove_extra_whitespaces)
        self._following = sp if self.legacy else SentencePieceProcessor(model_proto=proto.SerializeToString())
        super().__init__(table, special, [special.get(settings.get(key), i) for key, i in zip(SPECIAL_KEYS, ids)])
        self.strips = strips(self._beside.values())
        self.added = tuple(p.piece for p in proto.pieces if p.type == p.USER_DEFINED)
        if config is not None:
            self.chat_template, self.begins = config.get("chat_template"), self.ids_before_text(config)

    def _encode(self, text: str, follows_special: bool) -> list[int]:
        return (self._following if follows_special else self._processor).encode(text)

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        try:
            return self._processor.encode(texts, return_type="numpy", num_threads=1)
        except (RuntimeError, TypeError):  # a surrogate; one text after another, `encode` names it
            return super().encode_all(texts)

    def guarding(self, names: Iterable[str]) -> SentencePieceTokenizer:
        more = {self._processor.piece_to_id(name): AddedToken(name, special=True) for name in names}
        model = self._processor.serialized_model_proto()
        return SentencePieceTokenizer(model, config=self._config, added=self._beside | more)

    def serialized(self) -> bytes:
        """Return the model as the bytes of a `.model`, with the names of special tokens that stand beside it."""
        return self._processor.serialized_model_proto()

    def pieces(self) -> dict[str, int]:
        """Return the ids of all pieces of the model, and of the special tokens beside it, by name."""
        return {self._processor.id_to_piece(i): i for i in range(self._processor.get_piece_size())} | self.special

    def ids_before_text(self, config: dict[str, Any]) -> list[int]:
        # Without a word in the config, a model with bos is LLaMA's, whose tokenizer writes it, unless the directory is
        # one of `save`, or the vocabulary one of ours or ChatGLM2's.
        ours = "tokenizer_model_of" in config or all(marker in self.special for marker in MARKERS)
        wanted = config.get("add_bos_token", not ours and "sop" not in self.special)
        return [self.bos_id] if wanted and self.bos_id is not None else []

    def encode_spans(self, text: str, follows_special: bool = False) -> tuple[list[int], np.ndarray]:
        raw = np.frombuffer(text.encode(), np.uint8)
        if self._normalises:  # SentencePiece says where each piece comes from; counting, below, is quicker
            pieces = (self._following if follows_special else self._processor).encode(text, return_type="proto").pieces
            before = np.append(0, np.cumsum((raw & 0xC0) != 0x80))  # (bytes + 1,) number of characters that began
            return [p.id for p in pieces], before[np.array([(p.begin, p.end) for p in pieces], np.int64).reshape(-1, 2)]
        ids = self.encode(text, follows_special)  # count the bytes of the pieces
        char_of = np.cumsum((raw & 0xC0) != 0x80) - 1  # (bytes,) index of its character; 10xxxxxx continues one
        lengths = self._lengths[ids]
        prefix = self.dummy_prefix and (self.legacy or not follows_special)
        stops = np.cumsum(lengths) - prefix  # (n,) end of each token in bytes, without the added space
        # first and last byte of each token; clipped, because the added space has no byte in the text
        first, last = (np.clip(at, 0, len(raw) - 1) for at in (stops - lengths, stops - 1))
        return ids, np.stack((char_of[first], char_of[last] + 1), axis=1)

    def _files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        model = self._processor.serialized_model_proto()
        fast = to_tokenizers(ModelProto.FromString(model), self.special, self._beside, self.legacy)
        config: dict[str, Any] = self.special_names() | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.begins:
            bos = config["bos_token"]
            fast.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, self.bos_id)])
            config["add_bos_token"] = True
        if self._beside:
            config["added_tokens_decoder"] = to_plain(self._beside.items())
        if not self.legacy:
            config["legacy"] = False
        same = fast.to_str().encode()
        # load_tokenizer compares this hash and reads the .model, which is faster, if tokenizer.json is unchanged.
        config["tokenizer_model_of"] = hashlib.sha256(same).hexdigest()
        return config, {"tokenizer.model": model, "tokenizer.json": same}


def read_model(model: bytes, name: str | Path) -> ModelProto:
    """Return the contents of a SentencePiece `.model`; ValueError where the bytes are none."""
    proto = ModelProto()
    with contextlib.suppress(DecodeError):
        proto.ParseFromString(model)
    if not proto.HasField("normalizer_spec"):  # the last field of the file: a truncated file may still parse
        raise ValueError(f"{name} is not a SentencePiece model (damaged, truncated, or a git-lfs pointer)")
    return proto


def to_tokenizers(
    proto: ModelProto, special: dict[str, int], added: Mapping[int, AddedToken], legacy: bool
) -> tokenizers.Tokenizer:
    """Convert a SentencePiece model to a tokenizer of the `tokenizers` library with the same ids for every text.

    special: name -> id of special tokens; added: those of them that have flags of their own; legacy: a text after a
    special token begins with a space, too.

    (Two differences: with NFKC, the library drops a combining mark after a ligature; SentencePiece keeps it. A text
    that is nothing but one user-defined piece of a BPE model has no space before it.)
    Raises ValueError for models that the library cannot express: neither BPE nor unigram, spaces as suffixes,
    user-defined pieces that the model's own normalisation changes.
    """
    spec, norm = proto.trainer_spec, proto.normalizer_spec
    unigram = spec.model_type == TrainerSpec.UNIGRAM
    kinds = (TrainerSpec.BPE, TrainerSpec.UNIGRAM)
    if spec.model_type not in kinds or spec.treat_whitespace_as_suffix or not norm.escape_whitespaces:
        raise ValueError(
            "the tokenizer cannot be saved with a model: "
            "only SentencePiece models of type BPE or unigram, with spaces before words, can be written as a "
            "tokenizer.json; train a tokenizer with train_tokenizer.py, or with model_type=bpe"
        )
    tokenizer = tokenizers.Tokenizer(unigram_model(proto) if unigram else bpe_model(proto, special))
    # never cut, whatever stands beside them; in a unigram model, their score sees to that
    whole = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED]
    tokenizer.normalizer = normalizers.Sequence(normalizer_steps(norm, [] if unigram else whole, legacy))
    plain_form = normalizers.Sequence(normalizer_steps(norm, whole, legacy))
    if changed := [piece for piece in whole if plain_form.normalize_str(piece) != piece]:
        raise ValueError(f"the model's normalisation changes its user-defined piece {changed[0]!r}: train it without")
    steps: list[pre_tokenizers.PreTokenizer] = []
    if not legacy:  # a space before the first text, even before another space; the second step writes it as the sign
        steps.append(pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False))
        steps.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False))
    if steps := [*steps, *([cut_names(proto)] if unigram else [])]:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back + [decoders.Strip(" ", 1, 0)] * norm.add_dummy_prefix)
    if not unigram:
        tokenizer.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in whole])
    # ChatGLM2's five pieces are not in this list: transformers would find "sop" inside the word "philosophy".
    inside = [piece for piece, i in special.items() if i < len(proto.pieces) and i not in added]
    plain = [AddedToken(piece, special=True, normalized=False) for piece in inside]
    tokenizer.add_special_tokens([*plain, *(added[i] for i in sorted(added))])
    check_ids(tokenizer, added)
    return tokenizer


def bpe_model(proto: ModelProto, special: dict[str, int]) -> models.BPE:
    """Return the library's model of a SentencePiece BPE model.

    SentencePiece repeatedly joins the two neighbours whose joined piece has the best score, leftmost first. A merge
    table does the same if it lists every pair of pieces that join to a piece, sorted by that piece's score.
    """
    score = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    # merge table: all ways to split each piece into two pieces, best score first
    pairs = [(w[:i], w[i:]) for w in score for i in range(1, len(w)) if w[:i] in score and w[i:] in score]
    pairs.sort(key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0])))
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)} | special
    unk = next(p.piece for p in proto.pieces if p.type == p.UNKNOWN)
    return models.BPE(vocab, pairs, unk_token=unk, byte_fallback=proto.trainer_spec.byte_fallback, fuse_unk=True)


def normalizer_steps(norm: NormalizerSpec, whole: list[str], legacy: bool) -> list[normalizers.Normalizer]:
    """Return normalisation as SentencePiece does it: character map, spaces removed, space added in front, all escaped.

    whole: user-defined pieces. The library normalises them as texts, so a text that is one of them has no space added.
    """
    steps = [normalizers.Precompiled(norm.precompiled_charsmap)] if norm.precompiled_charsmap else []
    if norm.remove_extra_whitespaces:
        steps += [normalizers.Replace(tokenizers.Regex(old), new) for old, new in ((r"\A +| +\z", ""), (" {2,}", " "))]
    if norm.add_dummy_prefix and legacy:
        start = rf"\A(?!(?:{'|'.join(map(re.escape, whole))})\z)"
        steps.append(normalizers.Replace(tokenizers.Regex(start), SPACE) if whole else normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]

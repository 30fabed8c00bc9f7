"""Tokenizers from a SentencePiece `.model`, and what the `tokenizers` library needs to read the same ids."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, decoders, models, normalizers, processors

from tokenizer.base import MARKERS, SPACE, Tokenizer, piece_bytes

# ChatGLM2 adds five pieces after those of its SentencePiece model. Only the size of the model identifies its file.
CHATGLM2_PIECES = 64789
CHATGLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


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
        table = [b"" if p.piece in special else piece_bytes(p.piece, p.type == p.BYTE) for p in proto.pieces]
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

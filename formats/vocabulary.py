"""Vocabularies of SentencePiece as tables of pieces, scores and types, which other programs have in their files."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from tokenizer.sentencepiece_model import read_model

ADDED = -1000.0  # score of a token beside the model: no text should be joined to it, whatever its type
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")


def proto_of(tokenizer: Tokenizer) -> ModelProto | None:
    """Return the SentencePiece model of a tokenizer, with the tokens that were added beside it; None where it has none.

    Pieces of the model whose ids have another name beside it have that name.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = read_model(tokenizer.serialized(), "the tokenizer")
    elif isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.model is not None:
        proto = read_model(tokenizer.model, "tokenizer.model")
    else:
        return None
    for i in range(len(proto.pieces), tokenizer.vocab_size):
        added = next((name for name, at in tokenizer.special.items() if at == i), None)
        kind = ModelProto.SentencePiece.CONTROL if added else ModelProto.SentencePiece.USER_DEFINED
        text = added or tokenizer.id_to_bytes(i).decode(errors="replace")
        piece = proto.pieces.add(piece=text or f"<unused_{i}>", type=kind if text else ModelProto.SentencePiece.UNUSED)
        piece.score = ADDED
    return proto


def normalises(proto: ModelProto) -> bool:
    """Return whether a SentencePiece model changes a text before it is cut: characters, or spaces that are two or at an
    end."""
    return bool(proto.normalizer_spec.precompiled_charsmap) or proto.normalizer_spec.remove_extra_whitespaces


def new_model(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], ids: dict[str, int], prefix: bool = True
) -> ModelProto:
    """Return a SentencePiece BPE model of a table.

    pieces: with U+2581 for a space; kinds: in SentencePiece's numbers; ids: of bos, eos, pad and unk, those that there
    are; prefix: whether a space is put before every text.
    """
    proto = ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds):
        proto.pieces.add(piece=piece, score=score, type=kind)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size = TrainerSpec.BPE, len(pieces)
    spec.byte_fallback = ModelProto.SentencePiece.BYTE in kinds
    for key in ("bos", "eos", "pad", "unk"):
        i = ids.get(key, -1)
        setattr(spec, f"{key}_id", i)
        if i >= 0:
            setattr(spec, f"{key}_piece", pieces[i])
    norm = proto.normalizer_spec
    norm.name, norm.add_dummy_prefix, norm.remove_extra_whitespaces, norm.escape_whitespaces = (
        "identity",
        prefix,
        False,
        True,
    )
    return proto

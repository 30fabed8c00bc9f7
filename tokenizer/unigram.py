"""SentencePiece's unigram models as models of the `tokenizers` library, which finds the same best path of pieces."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, models, pre_tokenizers

from tokenizer.base import SPACE

OWN_SCORE = -0.1  # of a user-defined piece, whatever its length; pieces that were learnt have a log-probability


def unigram_model(proto: ModelProto) -> models.Unigram:
    """Return the library's model of a SentencePiece unigram model.

    The library also finds the names of control tokens and bytes in a text: `cut_names` sees to it that none comes.
    Their score is that of the rarest piece, because an unknown character costs 10 more than the worst of all scores.
    (A difference: SentencePiece adds scores in float32. Where two paths have the same score, as "--" "-" and "-" "--",
    rounding decides; in a text of thousands of characters, this concerns about 1 of 200,000 tokens more.)
    Raises ValueError for scores above 0, for which SentencePiece weighs user-defined pieces by another rule.
    """
    learnt = [p.score for p in proto.pieces if p.type == p.NORMAL]
    worst = min(learnt, default=0.0)
    if max(learnt, default=0.0) > 0:
        raise ValueError(
            "the unigram model has pieces with a score above 0, which is no log-probability: train it again"
        )
    scores = {ModelProto.SentencePiece.USER_DEFINED: OWN_SCORE}
    vocab = [(p.piece, p.score if p.type == p.NORMAL else scores.get(p.type, worst)) for p in proto.pieces]
    unk = next(i for i, p in enumerate(proto.pieces) if p.type == p.UNKNOWN)
    return models.Unigram(vocab, unk, proto.trainer_spec.byte_fallback)


def cut_names(proto: ModelProto) -> pre_tokenizers.PreTokenizer:
    """Return a step that cuts each name of a control token or a byte which stands in a text, as <s> and <0x0A>.

    A name is cut between two characters that no piece has side by side, so that the best path of pieces stays the same.
    Raises ValueError where there are none.
    """
    learnt = [p.piece for p in proto.pieces if p.type in (p.NORMAL, p.USER_DEFINED)]
    known = {piece for piece in learnt if len(piece) == 1}
    inside = {piece[i : i + 2] for piece in learnt for i in range(len(piece) - 1)}
    rests = defaultdict(list)  # first part of a name -> second parts
    for piece in (p.piece for p in proto.pieces if p.type not in (p.NORMAL, p.USER_DEFINED)):
        name = piece.replace(" ", SPACE)
        for i in range(1, len(name)):
            # two unknown characters side by side are one <unk>, unless they are written as bytes
            alone = proto.trainer_spec.byte_fallback or known & {*name[i - 1 : i + 1]}
            if alone and name[i - 1 : i + 1] not in inside:
                rests[name[:i]].append(re.escape(name[i:]))
                break
        else:
            raise ValueError(
                f"the tokenizer cannot be saved with a model: a text that contains {piece!r} would be read otherwise, "
                "because the pieces of the unigram model allow no cut in this name; train a model with model_type=bpe"
            )
    places = "|".join(f"(?<={re.escape(first)})(?={'|'.join(rest)})" for first, rest in rests.items())
    return pre_tokenizers.Split(tokenizers.Regex(places), "isolated")


def ids_of_pieces(model: dict[str, Any]) -> dict[str, int]:
    """Return the id of each piece; model: that of a tokenizer.json, BPE (a dictionary) or unigram (pairs in a list)."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def unknown_piece(model: dict[str, Any]) -> str | None:
    """Return the piece for unknown characters, None where there is none; model: that of a tokenizer.json."""
    if isinstance(model["vocab"], dict):
        return model.get("unk_token")
    return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]


def check_ids(backend: tokenizers.Tokenizer, tokens: Mapping[int, AddedToken]) -> None:
    """Raise ValueError unless added tokens have their ids, which in a unigram model follow those of its pieces."""
    for i, token in tokens.items():
        if (found := backend.token_to_id(token.content)) != i:
            raise ValueError(
                f"the added token {token.content!r} should have the id {i}, and the model's next free id is {found}"
            )

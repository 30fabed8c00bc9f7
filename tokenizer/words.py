"""Ids of the words that a text has again and again, which SentencePiece would compute each time.

A text is cut before its spaces. In a BPE model no two parts influence each other if no piece of the vocabulary lies
across such a place: then the ids of the text are those of its parts.
"""

from __future__ import annotations

import re
from itertools import chain

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from tokenizer.base import SPACE

LONGEST = 24  # characters of a word that is kept; a text without spaces, such as Chinese, is one long word
MOST = 1 << 16  # words that are kept
ACROSS = re.compile(f"[^{SPACE}]{SPACE}")


class Words(dict[str, list[int]]):
    """Word -> ids of a space and the word; what is missing is computed. processor: adds no space before a text."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self.processor = processor

    def __missing__(self, word: str) -> list[int]:
        ids = self.processor.encode(" " + word)
        if len(word) <= LONGEST:
            if len(self) >= MOST:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, text: str, prefix: bool) -> list[int]:
        """Return the ids of a text, before which a space is put (`prefix`) unless it is empty."""
        if not text:
            return []
        words = text.split(" ")
        if "" in words or SPACE in text:  # several spaces in a row may be one piece
            return self.processor.encode(" " * prefix + text)
        if prefix:
            return list(chain.from_iterable(map(self.__getitem__, words)))
        return list(chain(self.processor.encode(words[0]), *map(self.__getitem__, words[1:])))


def words_of(proto: ModelProto) -> Words | None:
    """Return the words of a model; None for one whose texts cannot be cut before each space."""
    norm, spec = proto.normalizer_spec, proto.trainer_spec
    changes = norm.precompiled_charsmap or norm.remove_extra_whitespaces or not norm.escape_whitespaces
    if spec.model_type != TrainerSpec.BPE or spec.treat_whitespace_as_suffix or changes:
        return None
    pieces = {p.piece.replace(" ", SPACE) for p in proto.pieces}
    if SPACE not in pieces or any(map(ACROSS.search, pieces)):  # an unknown space would be one id with its neighbours
        return None
    inner = ModelProto.FromString(proto.SerializeToString())
    inner.normalizer_spec.add_dummy_prefix = False
    return Words(SentencePieceProcessor(model_proto=inner.SerializeToString()))

"""`tokenizer.bin` of llama2.c: a uint32, the bytes of the longest piece; then for each id its score (float32), the
number of its bytes (uint32) and the bytes. Ids 0, 1 and 2 are unknown, bos and eos; 3 to 258 are bytes, as <0x0A>.

`run.c` joins the two neighbours whose joined piece has the best score, as SentencePiece does, puts bos and a space
before a text, and does not know control pieces.
"""

from __future__ import annotations

import struct
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from cli.progress import say
from formats.vocabulary import BYTE_NAME, new_model, normalises, proto_of
from tokenizer import SPACE, SentencePieceTokenizer, Tokenizer

BOS, EOS = "\n<s>\n", "\n</s>\n"  # how it writes the two


def to_bytes(tokenizer: Tokenizer | None) -> bytes | None:
    """Return a tokenizer as a tokenizer.bin; None, with a notice, where llama2.c has no such tokenizers."""
    if tokenizer is None:
        return None
    proto = proto_of(tokenizer)
    if proto is None or proto.trainer_spec.model_type != TrainerSpec.BPE:
        say("no tokenizer.bin is written: llama2.c has SentencePiece's BPE, and the tokenizer of the model is another")
        return None
    differences = {
        "ids other than 1 and 2 for bos and eos": (tokenizer.bos_id, tokenizer.eos_id) != (1, 2),
        "no space before a text": not proto.normalizer_spec.add_dummy_prefix,
        "no bos before a text": not tokenizer.begins,
        "a text whose characters or spaces are normalised": normalises(proto),
    }
    if found := [what for what, differs in differences.items() if differs]:
        say(f"run.c will read other ids than the tokenizer of the model, which has {', '.join(found)}")
    pieces = []
    for i, piece in enumerate(proto.pieces):
        text = {tokenizer.bos_id: BOS, tokenizer.eos_id: EOS}.get(i, piece.piece)
        raw = text.replace(SPACE, " ").encode()
        pieces.append((struct.pack("<fI", piece.score, len(raw)) + raw, len(raw)))
    return struct.pack("<I", max(length for _, length in pieces)) + b"".join(raw for raw, _ in pieces)


def beside(path: Path, vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer in NAME.tokenizer.bin or tokenizer.bin beside a model; None where there is none."""
    for place in (path.with_name(f"{path.stem}.tokenizer.bin"), path.with_name("tokenizer.bin")):
        if place != path and place.is_file():
            return read(place, vocab_size)
    return None


def read(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.bin; ValueError where it is none, or has another number of ids."""
    raw, at = path.read_bytes(), 4
    pieces: list[tuple[bytes, float]] = []
    while at < len(raw) and len(raw) - at >= 8:
        score, length = struct.unpack_from("<fI", raw, at)
        pieces.append((raw[at + 8 : at + 8 + length], score))
        at += 8 + length
    if at != len(raw) or len(pieces) < 3 or struct.unpack_from("<I", raw)[0] < max(len(piece) for piece, _ in pieces):
        raise ValueError(f"{path} is no tokenizer.bin of llama2.c (truncated or damaged)")
    if vocab_size is not None and len(pieces) != vocab_size:
        raise ValueError(
            f"{path} has {len(pieces)} ids, and the model beside it {vocab_size}: name another --tokenizer"
        )
    try:
        texts = [piece.decode() for piece, _ in pieces]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a piece is not UTF-8: {error}") from None
    texts[:3] = ["<unk>", "<s>", "</s>"]
    kinds = [kind_of(i, text) for i, text in enumerate(texts)]
    scores = [score for _, score in pieces]
    model = new_model([text.replace(" ", SPACE) for text in texts], scores, kinds, {"bos": 1, "eos": 2, "unk": 0})
    return SentencePieceTokenizer(model.SerializeToString(), path, {"add_bos_token": True})


def kind_of(i: int, piece: str) -> int:
    """Return the type of a piece, which the file does not have, in SentencePiece's numbers."""
    kinds = ModelProto.SentencePiece
    if i < 3:
        return kinds.UNKNOWN if i == 0 else kinds.CONTROL
    return kinds.BYTE if BYTE_NAME.fullmatch(piece) else kinds.NORMAL

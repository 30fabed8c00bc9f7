"""Tokenizers: convert text to ids and back, with one interface for all files of vocabularies.

- `.model`: SentencePiece BPE (ours, LLaMA's, ChatGLM2's) or unigram.
- `tokenizer.json`: byte-level or SentencePiece-style BPE, or unigram, of the `tokenizers` library (Llama 3, Qwen).

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

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizer.added import with_plain_tokens
from tokenizer.base import MARKERS, SPACE, Tokenizer
from tokenizer.config import read_added_tokens, read_config
from tokenizer.huggingface import HuggingFaceTokenizer
from tokenizer.sentencepiece_model import SentencePieceTokenizer

__all__ = [
    "MARKERS",
    "SPACE",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_saving",
    "load_tokenizer",
]

TEXTS = ("the rain", "  two spaces  within  it ", "雨停了，2024 年。\n\tif x == 1:", "é😀 ﬁ", "")  # for check_saving


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer from a directory, a `.model` file or a `tokenizer.json`.

    In a directory with both files, `tokenizer.json` decides, as in transformers: it may contain tokens added later.
    Raises FileNotFoundError if there is no tokenizer, ValueError if it is damaged or of an unknown kind.
    """
    path = Path(path)
    if path.is_dir():
        model, path = path / "tokenizer.model", path / "tokenizer.json"
        written_for = read_config(path.parent).get("tokenizer_model_of")
        if model.is_file() and (not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() == written_for):
            path = model
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer (and no .model there); train one with train_tokenizer.py")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    config = read_config(path.parent)
    added = read_added_tokens(path.parent, config)
    special = {i: token for i, token in added.items() if token.special}
    tokenizer = SentencePieceTokenizer(path.read_bytes(), path, config, special)
    known = {*tokenizer.special, *tokenizer.added}
    plain = {i: token for i, token in added.items() if not token.special and token.content not in known}
    return with_plain_tokens(tokenizer, plain, path.parent) if plain else tokenizer


def check_saving(tokenizer: Tokenizer) -> None:
    """Save a tokenizer into a temporary directory; raise ValueError unless transformers would read the same ids there.

    Call it before long work whose result is saved with the tokenizer.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        ours, theirs = load_tokenizer(folder), HuggingFaceTokenizer(Path(folder, "tokenizer.json"))

    def facts(of: Tokenizer) -> tuple[Any, ...]:
        return of.sha256(), of.special, of.begins, of.special_names(), of.strips, of.chat_template

    texts = [*TEXTS, *(f"a {name} b{name}c" for name in [*tokenizer.added, *tokenizer.special][:100])]
    pairs = [(text, after) for text in texts for after in (False, True)]
    wrong = [text for text, after in pairs if tokenizer.encode(text, after) != theirs.encode(text, after)]
    if wrong or facts(tokenizer) != facts(ours):
        what = f"other ids of {wrong[0]!r}" if wrong else "other tokens"
        raise ValueError(
            f"this tokenizer cannot be saved, because transformers would read {what}; "
            "use a tokenizer.json, or train a tokenizer with train_tokenizer.py"
        )

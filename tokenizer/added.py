"""More tokens behind a vocabulary, which is then a `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tokenizer.base import SPACE, Tokenizer
from tokenizer.cutting import steps_of
from tokenizer.huggingface import HuggingFaceTokenizer
from tokenizer.sentencepiece_model import SentencePieceTokenizer
from tokenizer.unigram import check_ids


def with_tokens(
    tokenizer: Tokenizer, tokens: Sequence[AddedToken], ids: Sequence[int] = (), prefix: str = "first"
) -> HuggingFaceTokenizer:
    """Return a copy of a tokenizer with more tokens, which is saved as a tokenizer.json.

    ids: one for each of `tokens`; default: after the tokenizer's own, in this order
    prefix: which texts get the space that a vocabulary puts before texts, where tokens that are not special cut a text
    into parts: "first" or "always" (every part). Raises ValueError where the tokenizer cannot be saved.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        path, config_path = Path(folder, "tokenizer.json"), Path(folder, "tokenizer_config.json")
        settings = json.loads(path.read_text(encoding="utf8"))
        if not all(token.special for token in tokens):
            prefix_by(settings, prefix)
        if isinstance(settings["model"]["vocab"], dict):  # a list (unigram) has no place for a gap
            settings["model"]["vocab"] |= {token.content: i for token, i in zip(tokens, ids)}
        backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
        for token in tokens:  # one by one: the library puts special tokens first
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        check_ids(backend, dict(zip(ids, tokens)))
        path.write_text(backend.to_str(), encoding="utf8")
        config = json.loads(config_path.read_text(encoding="utf8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        for key in ("tokenizer_model_of", "added_tokens_decoder"):  # tokenizer.json says more than the .model beside it
            config.pop(key, None)
        config_path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf8")
        return HuggingFaceTokenizer(path)


def with_plain_tokens(
    tokenizer: SentencePieceTokenizer, added: Mapping[int, AddedToken], where: Path
) -> HuggingFaceTokenizer:
    """Return a tokenizer of a `.model` with the tokens beside it that are not special, by id.

    The spaces before parts of a text that such a token cuts are those of transformers' LlamaTokenizer. Raises
    ValueError where an id belongs to another piece.
    """
    pieces = tokenizer.pieces()
    for i, token in added.items():
        other = next((each for each, at in pieces.items() if (each == token.content) != (at == i)), None)
        if other is not None:
            at = f"the id of {other!r}" if other != token.content else f"{pieces[other]} in the model"
            raise ValueError(f"{where}: the added token {token.content!r} has the id {i}, which is {at}")
    return with_tokens(tokenizer, [*added.values()], [*added], "always" if tokenizer.legacy else "first")


def prefix_by(settings: dict[str, Any], scheme: str) -> None:
    """Change a tokenizer.json such that it strips no spaces, and puts one before parts of a text as `scheme` says.

    Added tokens cut a text into parts, and the spaces beside such a token have to stay as they are.
    """
    steps = (settings["normalizer"] or {}).get("normalizers", [])
    prefix = any(step["type"] == "Prepend" for step in steps)
    kept = [
        step for step in steps if step["type"] != "Replace" or not step["pattern"].get("Regex", "").startswith("\\A")
    ]
    if prefix:
        kept = [step for step in kept if step["type"] != "Prepend" and step.get("content") != SPACE]
        metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        split = [metaspace, *steps_of(settings["pre_tokenizer"], "pretokenizers")]
        settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": split}
    if steps:
        settings["normalizer"]["normalizers"] = kept

"""Long texts in parts that have the same ids: the `tokenizers` library takes a hundred times the size of a text."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import tokenizers

from tokenizer.unigram import ids_of_pieces

PART = 2**16  # characters of a part, at least
LETTERS = "A-Za-z\u4e00-\u9fff"
STARTS = " ，。、！？；："  # characters that begin a word, or stand alone, in every published vocabulary
SAFE = ("NFC", "NFKC", "NFD", "NFKD", "Prepend", "Lowercase")  # normalizers that do not look beyond such a character


def steps_of(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer in a tokenizer.json; key: where a sequence has them."""
    return part.get(key, [part]) if part else []


def find_boundary(settings: dict[str, Any], backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern of the places where a text can be cut without a change of its ids; None where there are none.

    Such a place is before a space or a Chinese punctuation mark that follows a letter, if the pre-tokenizer always cuts
    there, or, where it never cuts, if no piece of the vocabulary has this character behind another one.
    """
    for step in steps_of(settings.get("normalizer"), "normalizers"):
        replaces = step["type"] == "Replace" and step["pattern"].get("String") == " " and step["content"] == "\u2581"
        if step["type"] not in SAFE and not replaces:
            return None
    cuts = [step for step in steps_of(settings.get("pre_tokenizer"), "pretokenizers") if step.get("split", True)]
    model = settings["model"]
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    vocab = ids_of_pieces(model)
    safe = [char for char in STARTS if (splits_before(backend, char) if cuts else begins_pieces(vocab, char))]
    if not safe:
        return None
    after = "".join(char for char in safe if char != " ")
    ahead = [f" [{LETTERS}]"] * (" " in safe) + [f"[{after}]"] * bool(after)
    boundary = re.compile(f"(?<=[{LETTERS}])(?={'|'.join(ahead)})")
    for token in settings["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or boundary.search(token["content"]):
            return None
    return boundary


def splits_before(backend: tokenizers.Tokenizer, char: str) -> bool:
    """Whether the pre-tokenizer cuts before a character that follows a letter, and where alone."""
    texts = [f"{left}{char}{right}" for left in ("ab", "雨停") for right in ("cd", "石阶")]
    return all(2 in {span[0] for _, span in backend.pre_tokenizer.pre_tokenize_str(text)} for text in texts)


def begins_pieces(vocab: dict[str, int], char: str) -> bool:
    """Whether a character is in the vocabulary, and stands in no piece behind another character."""
    char = "\u2581" if char == " " else char
    return char in vocab and not any(char in piece.lstrip(char) for piece in vocab)


def inner_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json that puts no space before a text."""
    settings = copy.copy(settings)
    normalizer = copy.deepcopy(settings.get("normalizer"))
    if normalizer:
        kept = [step for step in steps_of(normalizer, "normalizers") if step["type"] != "Prepend"]
        settings["normalizer"] = {"type": "Sequence", "normalizers": kept}
    settings["pre_tokenizer"] = copy.deepcopy(settings.get("pre_tokenizer"))
    for step in steps_of(settings["pre_tokenizer"], "pretokenizers"):
        for key, value in (("prepend_scheme", "never"), ("add_prefix_space", False)):
            if key in step:
                step[key] = value
    return settings


def parts_of(text: str, boundary: re.Pattern[str] | None) -> Iterator[tuple[int, str]]:
    """Yield the parts of a text and where each begins; a text of fewer than 2 * PART characters is one part."""
    start = 0
    while boundary and len(text) - start >= 2 * PART and (place := boundary.search(text, start + PART)):
        yield start, text[start : place.start()]
        start = place.start()
    yield start, text[start:]

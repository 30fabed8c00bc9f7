"""The JSON files and templates beside a vocabulary, as older and newer versions of transformers write them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from files import read_json_object
from tokenizer.base import SPECIAL_KEYS

LARGEST_ID = 2**24  # the largest vocabularies in use have about 2**18 ids
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")  # of an AddedToken


def read_config(directory: Path) -> dict[str, Any]:
    """Read `tokenizer_config.json` and the files that older and newer versions of transformers write beside it.

    Special tokens come as their names, or None. Raises ValueError where a file is damaged.
    """
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            config |= read_json_object(directory / name)
    where = directory / "tokenizer_config.json"
    for key in SPECIAL_KEYS:
        config[key] = None if config.get(key) is None else token_name(config[key], f"{where}: {key}")
    if (directory / "chat_template.jinja").is_file():
        config["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf8")
    return config


def token_name(token: Any, where: str) -> str:
    """Return the text of a token that is a string, or an object with `content`; ValueError where it is neither."""
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} should be a text, or an object with a text as content, found {token!r:.100}")
    return name


def read_added_tokens(directory: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Return the tokens of `added_tokens.json` and of `added_tokens_decoder` in `config`, by id, as transformers does.

    config: of `read_config`. In `added_tokens.json`, those are special that `config` names as special tokens.
    Raises ValueError where an entry is damaged.
    """
    where = directory / "tokenizer_config.json"
    main = {config[key] for key in SPECIAL_KEYS} - {None}
    lists = [config.get(f"{kind}_special_tokens") or [] for kind in ("additional", "extra")]
    if not all(isinstance(each, list | dict) for each in lists):
        raise ValueError(f"{where}: additional_special_tokens should be a list of tokens")
    extra = [token for each in lists for token in (each.values() if isinstance(each, dict) else each)]
    named = main | {token_name(token, f"{where}: additional_special_tokens") for token in extra}
    tokens: dict[int, AddedToken] = {}
    path = directory / "added_tokens.json"
    for content, i in read_json_object(path).items() if path.is_file() else ():
        special = content in named
        tokens[check_id(i, path)] = AddedToken(content, special=special, normalized=not special)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{where}: added_tokens_decoder should be an object, found {type(decoder).__name__}")
    for i, token in decoder.items():
        content = token_name(token, f"{where}: added_tokens_decoder {i}")
        flags = {key: token[key] for key in FLAGS if isinstance(token, dict) and isinstance(token.get(key), bool)}
        if content in main:
            flags["special"] = True
        tokens[check_id(int(i) if i.isdecimal() else i, where)] = AddedToken(content, **flags)
    names = [token.content for token in tokens.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{where}, added_tokens.json: the token {twice[0]!r} has two ids; remove the wrong one")
    return dict(sorted(tokens.items()))


def to_plain(tokens: Iterable[tuple[int, AddedToken]]) -> dict[str, dict[str, Any]]:
    """Return tokens by id in the form of `added_tokens_decoder`."""
    return {str(i): {"content": t.content} | {flag: getattr(t, flag) for flag in FLAGS} for i, t in tokens}


def check_id(i: Any, where: Path) -> int:
    """Return the id of a token; ValueError where it is none, or larger than any vocabulary."""
    if type(i) is not int or not 0 <= i < LARGEST_ID:
        raise ValueError(f"{where}: the id of a token should be a number from 0 to {LARGEST_ID - 1:,}, found {i!r:.50}")
    return i

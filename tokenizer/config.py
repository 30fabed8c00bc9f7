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

    Special tokens come as their names, or None; `chat_template` as a text, texts by name, or None. Raises ValueError
    where a file is damaged.
    """
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            config |= read_json_object(directory / name)
    where = directory / "tokenizer_config.json"
    for key in SPECIAL_KEYS:
        config[key] = None if config.get(key) is None else token_name(config[key], f"{where}: {key}")
    config["chat_template"] = read_templates(directory) or named_templates(config.get("chat_template"), where)
    return config


def read_templates(directory: Path) -> str | dict[str, str] | None:
    """Return the chat templates that are files in a directory, which count more than those in its config."""
    files = {"default": directory / "chat_template.jinja"}
    files = {name: path for name, path in files.items() if path.is_file()}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    try:
        texts = {name: path.read_text(encoding="utf8") for name, path in files.items()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{directory}: a chat template should be UTF-8 text: {error}") from None
    return texts["default"] if texts.keys() == {"default"} else texts or None


def named_templates(value: Any, where: Path) -> str | dict[str, str] | None:
    """Return the `chat_template` of a config: a text, or texts by name; ValueError where it is neither."""
    try:
        texts = {each["name"]: each["template"] for each in value} if isinstance(value, list) else value
    except (KeyError, TypeError):
        texts = value
    every = texts.items() if isinstance(texts, dict) else [("", texts or "")]
    if not all(isinstance(each, str) for pair in every for each in pair):
        what = "a text, or a list of objects with name and template"
        raise ValueError(f"{where}: chat_template should be {what}, found {value!r:.100}")
    return texts or None


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

"""What a flag expects, in words a person can read: in --help, and in the error about another value."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from cli.flags import listing
from cli.schema import Flag

WORDS = {int: "a whole number", float: "a number", bool: "yes or no", str: "text", Path: "a path", type(None): "None"}
MANY = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "a path": "paths"}
TAIL = 200  # characters of a value that a message shows


def kind(hint: Any) -> str:
    """Return what a flag of this type expects: "a number", "one of auto, cpu", "paths", "names with values or None"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in WORDS:
        return WORDS[hint]
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        return listing([kind(part) for part in parts], "or")
    if origin is tuple:
        one = kind(parts[0])
        return MANY.get(one, one) if parts[-1] is Ellipsis else f"{len(parts)} {MANY.get(one, one)}"
    return "names with values" if origin is dict else str(hint)


def readable() -> ConstructorRegistry:
    """Return rules for tyro by which --help names the types of `kind`."""
    registry, waiting = ConstructorRegistry(), []

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if waiting:  # the rule asks for the spec that there is without it
            return None
        waiting.append(info)
        spec = ConstructorRegistry.get_primitive_spec(info)
        waiting.pop()
        name = kind(info.type).replace(" or None", "").removeprefix("a ")
        return dataclasses.replace(spec, metavar=f"<{name}>") if isinstance(spec, PrimitiveConstructorSpec) else None

    return registry


def explain(text: str, flags: Iterable[Flag], words: Sequence[str]) -> str:
    """Return tyro's error as one sentence.

    text: what tyro printed; words: those that it was given
    """
    text = " ".join(re.sub("[╭╮╰╯│─+|]", " ", text).split())
    by_name = {flag.name: flag for flag in flags}
    if match := re.search(r"(?:Error parsing |argument ')(?:\S+/)?--([\w.]+)", text):
        values = values_of(match[1], words)
        found = "nothing" if not values else repr(values[0] if len(values) == 1 else " ".join(values))
        return f"--{match[1]} expects {kind(by_name[match[1]].hint)}, found {shortened(found)}"
    if "Missing from" in text:
        missing = [name for name in re.findall(r" --([\w.]+)", text) if name in by_name]
        return f"{listing([f'--{name}' for name in missing], 'and')} {'is' if len(missing) == 1 else 'are'} missing"
    if match := re.search("Unrecognized options: (.*?)(?: For full helptext|$)", text):
        return f"a flag such as --{next(iter(by_name))} was expected, found {shortened(match[1])!r}"
    return text.partition(" For full helptext")[0]


def shortened(text: str, most: int = TAIL) -> str:
    """Return a text, its middle left out where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def values_of(name: str, words: Sequence[str]) -> list[str]:
    """Return the last values that the words of a command line have for a flag."""
    values: list[str] = []
    own = False
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            own = flag == f"--{name}"
            values = ([value] if equals else []) if own else values
        elif own:
            values.append(word)
    return values

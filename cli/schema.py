"""The flags of a script, read from its dataclass: their names, types and bounds.

A bound stands beside the field, as a pair of the least and the largest sensible value in its type, and needs no import:
`lr: Annotated[float, (0, 10)] = 1e-3`. Both ends are allowed. Of several numbers, each is compared.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SWITCH = {"true": "True", "yes": "True", "on": "True", "false": "False", "no": "False", "off": "False"}


class Flag(NamedTuple):
    """A flag: a field of the dataclass of a script, or of a group in it."""

    name: str  # with its groups: "model.dim"
    hint: Any  # the type, without what Annotated adds
    bounds: tuple[float, float] | None
    aliases: tuple[str, ...]  # other names


def flags_of(cls: type, prefix: str = "") -> Iterator[Flag]:
    """Yield every flag of a dataclass, in order, those of its groups included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, *extras = typing.get_args(hints[field.name]) if is_annotated(hints[field.name]) else [hints[field.name]]
        if dataclasses.is_dataclass(hint):
            yield from flags_of(hint, f"{prefix}{field.name}.")
            continue
        bounds = next((extra for extra in extras if isinstance(extra, tuple)), None)
        aliases = [alias.removeprefix("--") for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        yield Flag(prefix + field.name, hint, bounds, tuple(aliases))


def is_annotated(hint: Any) -> bool:
    """Return whether a type is an Annotated one."""
    return typing.get_origin(hint) is typing.Annotated


def check_bounds(args: Any, prefix: str = "") -> None:
    """Raise ValueError for the first number of a dataclass, or of a group in it, that lies outside its bounds.

    prefix: text before the name of a field in the message, such as "--"
    """
    for name, _, bounds, _ in flags_of(type(args)):
        value = args
        for part in name.split("."):
            value = getattr(value, part)
        if bounds and not all(bounds[0] <= each <= bounds[1] for each in numbers(value)):
            least, most = (f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in bounds)
            found = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"{prefix}{name} should be from {least} to {most}, found {found}")


def numbers(value: Any) -> list[float]:
    """Return the numbers of a value: itself, those of a tuple, or nothing."""
    values = value if isinstance(value, tuple) else [value]
    return [each for each in values if isinstance(each, (int, float))]


def short_names(cls: type) -> dict[str, str]:
    """Return the path of each nested field of a dataclass whose name no other field has: temperature ->
    sampling.temperature."""
    places: dict[str, list[str]] = {}
    for flag in flags_of(cls):
        places.setdefault(flag.name.rpartition(".")[2], []).append(flag.name)
    return {name: paths[0] for name, paths in places.items() if len(paths) == 1 and "." in paths[0]}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return text such as `"; did you mean 'max_steps'?"`, or "" if no known name is similar."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def nearest_flag(name: str, known: Iterable[str]) -> str:
    """Return text such as "; did you mean --optim.lr?": a flag of that name in another group, or of a similar name."""
    last, known = name.rpartition(".")[2], list(known)
    same = [each for each in known if each.rpartition(".")[2] == last]
    lasts = {each.rpartition(".")[2]: each for each in reversed(known)}
    similar = difflib.get_close_matches(name, known, n=1) or [
        lasts[each] for each in difflib.get_close_matches(last, lasts, n=1)
    ]
    found = same[:3] or similar
    return f"; did you mean {' or '.join(f'--{each}' for each in found)}?" if found else ""


def mentions(hint: Any, kind: type) -> bool:
    """Return whether a type is `kind` or has it among its parts."""
    return hint is kind or any(mentions(part, kind) for part in typing.get_args(hint))


def as_switch(word: str, hint: Any) -> str:
    """Return a word of the command line; a truth value (yes, on, true) of a flag that takes one as Python writes it."""
    if hint is bool:
        return SWITCH.get(word.lower(), word)
    return word.capitalize() if word in ("true", "false") and mentions(hint, bool) else word


def check_word(flag: Flag, word: str) -> str:
    """Return a value as Python writes it; raises ValueError where it names no file although the flag does, or holds a
    character that no text has: half of a surrogate pair, or a byte that is not UTF-8."""
    names_file = mentions(flag.hint, Path)
    if names_file and (not word.strip(",") or "\0" in word):
        raise ValueError(f"--{flag.name} should name a file or folder, found {word!r}")
    try:
        os.fsencode(word) if names_file else word.encode()  # the name of a file may be any bytes
    except UnicodeEncodeError:
        raise ValueError(f"--{flag.name} should be text in UTF-8, found {word!r}") from None
    return as_switch(word, flag.hint)

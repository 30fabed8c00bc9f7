"""Odd values for flags and for fields of YAML and JSON, and texts with one of them in the place of a part."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

WORDS = ("", "abc", "-1", "0", "1", "2", "7", str(2**31), str(2**70), "1e308", "-1e308", "nan", "inf", "-inf", "1e400")
WORDS += (
    "x" * 10_000,
    "9" * 5_000,
    "\ud800",
    "\udc80",
    "\x00",
    "月",
    "None",
    "true",
    "off",
    "[1]",
    "{}",
    "1_0",
    "0x10",
)
WORDS += (
    ",",
    "-",
    "--",
    "=",
    " ",
    "\n",
    "%s",
    "nosuch/file",
    "file",
    "folder",
    ".",
    "..",
    "cuda",
    "meta",
    "cpu:7",
    "*",
)
WORDS += ("(", "[a", "a,b", "0.5", "1e-300", "4096", "auto", "none")
HUGE = (2**31, 2**40, 2**63, 2**70, -(2**70), 1e308, float("nan"), float("inf"), -float("inf"), "x" * 10_000, 10**400)
TYPES = (None, True, False, -1, 0, 1, 2, 7, 0.5, "", "a", "1", "\ud800", "\x00", "(", "{{", "[a", "../../etc")
NESTED = (
    [],
    {},
    [1],
    [None],
    ["a"],
    [[]],
    [{}],
    {"a": 1},
    {"": None},
    {"content": 1},
    {"type": "a"},
    list(range(2000)),
)
DEEP = "@@deep@@"  # stands for lists in lists, which json.dumps could not write
ODD = (*TYPES, *HUGE, *NESTED, DEEP)


def paths(value: Any, depth: int = 6, most: int = 40) -> Iterator[tuple]:
    """Yield the path of every field below a value; of a long list or object only the first and the last ones."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value)) if depth else []
    for key, each in items if len(items) <= most else items[: most // 2] + items[-most // 2 :]:
        yield (key,)
        if isinstance(each, dict | list):
            yield from ((key, *rest) for rest in paths(each, depth - 1, most))


def changed(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Return a copy of a value with one field removed, replaced or added, and what was done in words."""
    new = copy.deepcopy(value)
    every = list(paths(new))
    levels = {len(path) for path in every}
    level = rng.choice(sorted(levels))  # else most trials would go to the many fields far below
    *way, last = rng.choice([path for path in every if len(path) == level])
    place = new
    for key in way:
        place = place[key]
    where, how = ".".join(map(str, [*way, last])), rng.random()
    if how < 0.15:
        del place[last]
        return new, f"without {where}"
    if how < 0.2 and isinstance(place, list):
        place.append(copy.deepcopy(place[last]))
        return new, f"{where} twice"
    odd = copy.deepcopy(rng.choice([each for each in ODD if repr(each) != repr(place[last])]))
    place[last] = odd
    return new, f"{where} = {odd!r:.60}"


def with_depth(text: str, levels: int) -> str:
    """Return a text of JSON or YAML in which DEEP has become lists in lists."""
    return text.replace(json.dumps(DEEP), "[" * levels + "]" * levels).replace(DEEP, "[" * levels + "]" * levels)


def damaged(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return the bytes of a text file that is no such text any more, and what was done in words."""
    cut = rng.randrange(max(1, len(data)))
    hows: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "cut off": lambda: data[:cut],
        "no UTF-8": lambda: data[:cut] + b"\xff\xfe" + data[cut:],
        "with a zero byte": lambda: data[:cut] + b"\x00" + data[cut:],
        "UTF-16": lambda: data.decode("utf8", "replace").encode("utf-16"),
        "UTF-8 with a mark": lambda: b"\xef\xbb\xbf" + data,
        "a list": lambda: b"[1, 2]",
        "a number": lambda: b"1" * 5000,
        "null": lambda: b"null",
        "deep": lambda: b"[" * 100_000,
        "deep objects": lambda: b'{"a": ' * 100_000,
        "a tab": lambda: data[:cut] + b"\t" + data[cut:],
        "a brace": lambda: data[:cut] + rng.choice([b"{", b"}", b"]", b'"', b":", b"&a [*a, *a]"]) + data[cut:],
        "twice": lambda: data + data,
    }
    how = rng.choice(sorted(hows))
    return hows[how](), f"{how} at {cut}"

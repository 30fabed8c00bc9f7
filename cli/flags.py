"""A table of the flags of a script that go together only: what each of them needs, and why.

    NEEDS = (Needs("data.weights", "data.loss", ("task_token", "task_sample"), "weights belong to tasks; remove it"),)
    check_flags(args, NEEDS)        in the __post_init__ of the script's Args

`--data.weights 2 1` alone is then refused: "--data.weights needs --data.loss task_token or task_sample, found token:
weights belong to tasks; remove it".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Needs(NamedTuple):
    """One row of the table: where `flag` is set, the flag `other` must have one of `values`."""

    flag: str
    """name on the command line without its dashes; "data.coba_*" stands for several flags"""
    other: str  # name of the other flag, likewise
    values: tuple[Any, ...]  # values of the other flag that `flag` goes with
    why: str  # end of the message: the reason, and what to do; {args.out} in it stands for the value of --out
    is_set: Callable[[Any], bool] | None = None
    """whether a value of `flag` counts as set; None: every value but the default"""
    if_named: tuple[str, ...] = ()
    """flags among `flag` that count as set wherever the command line has them, also with their default values"""


_named: ContextVar[Set[str]] = ContextVar("named", default=frozenset())  # the flags that the command line has


@contextmanager
def on_command_line(names: Set[str]) -> Iterator[None]:
    """Let `check_flags` know within the block which flags the command line has."""
    token = _named.set(names)
    try:
        yield
    finally:
        _named.reset(token)


def check_flags(args: Any, rows: Iterable[Needs]) -> None:
    """Raise ValueError for the first row that `args`, a dataclass with dataclasses inside, does not keep."""
    for row in rows:
        ((_, found, _),) = read_flags(args, row.other)
        if found in row.values:
            continue
        flags = [
            f"--{name}" if isinstance(value, tuple) else f"--{name} {value}"
            for name, value, default in read_flags(args, row.flag)
            if (row.is_set(value) if row.is_set else value != default) or name in _named.get() & {*row.if_named}
        ]
        if flags:
            verb = "needs" if len(flags) == 1 else "need"
            needed = f"--{row.other} {listing(row.values, 'or')}"
            raise ValueError(f"{listing(flags, 'and')} {verb} {needed}, found {found}: {row.why.format(args=args)}")


def listing(items: Sequence[Any], last: str) -> str:
    """Return the items in one text, with the word `last` before the last one: "a, b or c"."""
    *before, end = map(str, items)
    return f"{', '.join(before)} {last} {end}" if before else end


def read_flags(args: Any, pattern: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the value and the default of every flag of `args` that matches `pattern`."""
    *groups, last = pattern.split(".")
    for group in groups:
        args = getattr(args, group)
    for field in dataclasses.fields(args):
        if fnmatchcase(field.name, last):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield ".".join([*groups, field.name]), getattr(args, field.name), default

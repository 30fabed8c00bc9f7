"""A table of the flags of a script that do something only beside others: what each of them needs, and why.

    NEEDS = (Needs("data.weights", "data.loss", ("task_token", "task_sample"), "weights belong to tasks; remove it"),)
    check_flags(args, NEEDS)        in the __post_init__ of the script's Args

`--data.weights 2 1` alone is then refused: "--data.weights needs --data.loss task_token or task_sample, found token:
weights belong to tasks; remove it".

A flag counts as set where its value is not the default. A value of a preset counts only where neither the preset nor
the command line has the other flag: `--optim.optimizer adamw` beside a preset for Muon is not refused for the `muon_lr`
in it, and the record of any run is a preset of the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Wanted(NamedTuple):
    """What the other flag of a row has to be, where its values cannot be listed."""

    holds: Callable[[Any, Any], bool]  # of its value and its default
    words: str  # how a message names it: "needs --train.eval_interval above 0"


SET = Wanted(lambda value, default: value != default, "")  # any value but the default
ABOVE_0 = Wanted(lambda value, default: value > 0, "above 0")


class Needs(NamedTuple):
    """One row of the table: where `flag` is set, the flag `other` must have one of `values`."""

    flag: str
    """name on the command line without its dashes; "data.coba_*" stands for several flags"""
    other: str
    """name of the other flag, likewise; "input or loader": at least one of them"""
    values: tuple[Any, ...] | Wanted
    """values of the other flag that `flag` goes with; (None,), (False,) and ((),): the two exclude each other"""
    why: str  # end of the message: the reason, and what to do; {args.out} in it stands for the value of --out
    is_set: Callable[[Any], bool] | None = None
    """whether a value of `flag` counts as set; None: every value but the default"""
    if_named: tuple[str, ...] = ()
    """flags among `flag` that count as set wherever the command line has them, also with their default values"""
    only_named: bool = False
    """whether a value counts only where the command line has it, because presets have it for other calls"""


_named: ContextVar[Set[str]] = ContextVar("named", default=frozenset())  # flags that the command line has
_preset: ContextVar[Set[str]] = ContextVar("preset", default=frozenset())  # flags that a preset has


@contextmanager
def where_set(command_line: Set[str], preset: Set[str]) -> Iterator[None]:
    """Let `check_flags` know within the block which flags the command line has, and which ones a preset."""
    tokens = _named.set(command_line), _preset.set(preset)
    try:
        yield
    finally:
        _named.reset(tokens[0])
        _preset.reset(tokens[1])


def check_flags(args: Any, rows: Iterable[Needs]) -> None:
    """Raise ValueError for the first row that `args`, a dataclass with dataclasses inside, does not keep."""
    for row in rows:
        others = [flag for name in row.other.split(" or ") for flag in read_flags(args, name)]
        if any(is_kept(row.values, value, default) for _, value, default in others):
            continue
        found = [flag for flag in read_flags(args, row.flag) if counts(row, *flag, {name for name, *_ in others})]
        if found:
            flags = listing([spelled(name, value) for name, value, _ in found], "and")
            raise ValueError(f"{flags} {needed(row, others, len(found))}: {row.why.format(args=args)}")


def is_kept(values: Collection[Any] | Wanted, value: Any, default: Any) -> bool:
    """Return whether the value of the other flag is one that a row wants."""
    return values.holds(value, default) if isinstance(values, Wanted) else value in values


def counts(row: Needs, name: str, value: Any, default: Any, others: Set[str]) -> bool:
    """Return whether a flag of a row counts as set; others: names of the other flags of the row."""
    named = _named.get()
    if name in row.if_named and name in named:
        return True
    if not (row.is_set(value) if row.is_set else value != default):
        return False
    return name in named or not (row.only_named or others & (named | _preset.get()))


def needed(row: Needs, others: Sequence[tuple[str, Any, Any]], n_flags: int) -> str:
    """Return the middle of a message: what the flags need, and what was found."""
    needs = "needs" if n_flags == 1 else "need"
    if isinstance(row.values, Wanted):
        names = listing([f"--{name}" for name, *_ in others], "or")
        return f"{needs} {names}" + (f" {row.values.words}, found {others[0][1]}" if row.values.words else "")
    (name, value, _), *_ = others
    if row.values in ((None,), ((),)) or row.values[0] is False:
        return f"{'does' if n_flags == 1 else 'do'} not go with {spelled(name, value)}"
    return f"{needs} --{name} {listing(row.values, 'or')}, found {value}"


def spelled(name: str, value: Any) -> str:
    """Return a flag as a message names it."""
    return f"--{name}" if isinstance(value, tuple) else f"--{name} {value}"


def listing(items: Sequence[Any], last: str) -> str:
    """Return the items in one text, with the word `last` before the last one: "a, b or c"."""
    *before, end = map(str, items)
    return f"{', '.join(before)} {last} {end}" if before else end


def read_flags(args: Any, pattern: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the value and the default of every flag of `args` that matches `pattern`.

    Where a script has another default than the dataclass of a group, both count as the default.
    """
    *groups, last = pattern.split(".")
    defaults = {field.name: default_of(field) for field in dataclasses.fields(args)}
    for group in groups:
        args, default = getattr(args, group), defaults[group]
        defaults = {field.name: getattr(default, field.name) for field in dataclasses.fields(args)}
    for field in dataclasses.fields(args):
        if fnmatchcase(field.name, last):
            value, default = getattr(args, field.name), defaults[field.name]
            yield ".".join([*groups, field.name]), value, value if value == default_of(field) else default


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a field; dataclasses.MISSING where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

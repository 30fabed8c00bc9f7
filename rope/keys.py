"""Kinds of values in a `rope_scaling` entry, and the check of an entry against the keys of its family."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

WINDOW = "original_max_position_embeddings"  # length of the texts of the first training, in tokens


class Kind(NamedTuple):
    """The values that a key may have."""

    words: str
    """description for error messages"""
    holds: Callable[[Any], bool]
    """whether a value is of this kind"""


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite int or float; a truth value is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


POSITIVE = Kind("a number, above 0", lambda value: is_number(value) and value > 0)
FACTOR = Kind("a number, at least 1", lambda value: is_number(value) and value >= 1)
COUNT = Kind("a whole number, at least 1", lambda value: type(value) is int and value >= 1)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
WORD = Kind("a name", lambda value: isinstance(value, str))
POSITIVES = Kind(
    "a list of numbers above 0",
    lambda value: isinstance(value, list | tuple) and all(is_number(v) and v > 0 for v in value),
)


def nearest(name: str, names: Mapping[str, Any]) -> str:
    """Return "did you mean ...? " for the name that is spelled most like `name`; "" when none is."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def check_keys(
    name: str, entry: Mapping[str, Any], required: Mapping[str, Kind], optional: Mapping[str, Kind], max_seq_len: int
) -> None:
    """Check the `entry` of a family: all required keys, no unknown ones, values of the right kinds.

    name: the `rope_type`, for messages. Raises ValueError, also when the window is longer than `max_seq_len` tokens.
    """
    of_type = f"rope_scaling of type {name!r}"
    if missing := sorted(required.keys() - entry.keys()):
        raise ValueError(f"{of_type} needs {', '.join(missing)}, found {sorted(entry)}")
    known = {**required, **optional}
    if unknown := sorted(entry.keys() - known.keys()):
        raise ValueError(
            f"{of_type} does not know {', '.join(unknown)}; "
            f"{nearest(unknown[0], known)}its keys are {', '.join(sorted(known)) or 'none'}"
        )
    for key, value in entry.items():
        if not known[key].holds(value):
            raise ValueError(f"{of_type}: {key} should be {known[key].words}, found {value!r}")
    if entry.get(WINDOW, 0) > max_seq_len:
        raise ValueError(
            f"{of_type}: {WINDOW} {entry[WINDOW]} is longer than max_seq_len {max_seq_len}; "
            "max_seq_len is the length after stretching"
        )

"""One check: what was expected, what was found, and what to do where they differ. And a list of them as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

OK, WARNING, FAULT = LEVELS = ("OK", "WARNING", "FAULT")


class Check(NamedTuple):
    """The result of looking at one thing."""

    level: str
    """OK; WARNING: it works, perhaps not as you wish; FAULT: the result cannot be right"""
    name: str
    expected: str
    found: str
    advice: str = ""
    """what to do; empty where the level is OK"""


def judged(name: str, expected: str, found: str, advice: str, bad: bool, level: str = FAULT) -> Check:
    """Return a check that is `level` with advice where something is `bad`, else OK without."""
    return Check(level, name, expected, found, advice) if bad else Check(OK, name, expected, found)


def attempt(name: str, expected: str, advice: str, work: Callable[[], Iterable[Check] | None]) -> list[Check]:
    """Return the checks that `work` yields; a ValueError or OSError that it raises is a FAULT, with its message."""
    found: list[Check] = []
    try:
        for each in work() or ():
            found.append(each)
    except (ValueError, OSError) as error:
        found.append(Check(FAULT, name, expected, " ".join(str(error).split()), advice))
    return found


def worst(checks: Sequence[Check]) -> str:
    """Return the gravest level among checks."""
    return max((each.level for each in checks), key=LEVELS.index, default=OK)


def conclude(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the checks as `as_json` does; SystemExit with status 1 where one is a fault."""
    if worst(checks) == FAULT:
        raise SystemExit(1)
    return as_json(checks)


def lines(checks: Sequence[Check]) -> list[str]:
    """Return a line for each check, two more where something is wrong, and a summary."""
    width = max((len(each.name) for each in checks), default=0)
    text = []
    for each in checks:
        text.append(f"{each.level:8} {each.name:{width}}  {each.found}")
        if each.level != OK:
            text += [f"{'':9}expected: {each.expected}", f"{'':9}what to do: {each.advice}"]
    counts = ", ".join(f"{sum(each.level == level for each in checks)} {level}" for level in LEVELS)
    return [*text, f"{len(checks)} checks: {counts}"]


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Return what `--json` writes."""
    return {"worst": worst(checks), "checks": [each._asdict() for each in checks]}

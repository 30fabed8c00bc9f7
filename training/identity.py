"""Which run a checkpoint belongs to: only one that has the same losses goes on from it."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from cli.progress import say
from files import point


def check_outside(run: Path, source: Path, resume: str) -> None:
    """Raise ValueError where a run that replaces the checkpoints in `run` would delete the model it starts from."""
    if resume == "never" and source.resolve().is_relative_to(run.resolve()):
        raise ValueError(
            f"--init_from {source} lies in --out {run}, and --train.resume never deletes the checkpoints there: choose "
            "another --out"
        )


def resolved(checkpoint: Path | None) -> Path | None:
    """Return the directory that a checkpoint or a link to one is."""
    return checkpoint and checkpoint.resolve()


def check_unchanged(run: Path, before: Path | None, now: Path | None) -> None:
    """Raise ValueError where the newest checkpoint of `run` is no longer what it was before the run was locked."""
    if now != before:
        raise ValueError(
            f"another process has changed {run} meanwhile: its newest checkpoint was {before and before.name}, and is "
            f"{now and now.name}; repeat the command"
        )


def begin_from(run: Path, checkpoint: Path, step: int) -> None:
    """Say from which checkpoint a run goes on. Let the link `last` lead to it, where it leads to a damaged one."""
    why = ""
    if checkpoint.name != "last" and (run / "last").is_symlink():
        point(run / "last", checkpoint)
        why = f" (from its newest whole checkpoint, {checkpoint.name})"
    elif checkpoint.name != "last":
        why = f" (there is no link `last`: from its newest checkpoint, {checkpoint.name})"
    say(f"going on from step {step} of {run}{why}")


def check_identity(run: Path, theirs: dict[str, Any], ours: dict[str, Any], main: bool) -> None:
    """Raise ValueError that names what differs between a run and the identity of the checkpoint in its directory.

    A checkpoint of an older version has neither `data` (name -> SHA-256) nor `shape`: it goes on, and `main` says so.
    """
    advice = "choose another --out, or use --train.resume never to replace it"
    if "data" in ours and "data" not in theirs and main:
        say(f"{run} does not state the contents of its data (an older version wrote it): they are not compared")
    for name, value in ours.items():
        stored = theirs.get(name)
        if stored == value or (name in ("data", "shape") and stored is None):
            continue
        if name == "data":
            if changed := other_contents(stored, value):
                raise ValueError(
                    f"{run} holds a run whose training data had other contents or another order, in "
                    f"{', '.join(changed)}: it cannot be continued; give it its data again, or {advice}"
                )
            continue
        if isinstance(stored, dict) and isinstance(value, dict):  # name only what differs
            keys = [key for key in stored | value if stored.get(key) != value.get(key)]
            stored, value = ({key: each.get(key) for key in keys} for each in (stored, value))
        what = f"{run} holds a run with {name} {stored!r}, and this one has {value!r}"
        raise ValueError(f"{what}: it cannot be continued; {advice}")


def other_contents(theirs: dict[str, str], ours: dict[str, str]) -> list[str]:
    """Return the names of the data, name -> SHA-256, whose contents differ by position; a name alone may change."""
    pairs = zip_longest(theirs.items(), ours.items(), fillvalue=("", ""))
    return [name or old for (old, before), (name, now) in pairs if before != now]

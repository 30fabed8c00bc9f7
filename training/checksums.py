"""The SHA-256 of every file of a checkpoint: written with it, compared before the checkpoint is used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cli.progress import say
from cli.record import file_sha256
from files import read_sealed, write_json, write_sealed

SUMS = Path("training_state", "sha256.json")
MOST_BYTES = 1 << 30  # of a file that is compared each time a model is asked: SHA-256 takes about 2 s a GB
RESULT = "result.json"
STATE = Path("training_state", "state.pt")
PROGRESS = Path("training_state", "progress.json")  # it may be newer than the other files, and holds its own sum


def write_result(run: Path, result: dict[str, Any]) -> None:
    """Write the `result.json` of a run, and its SHA-256 beside it, as `sha256sum -c result.sha256` reads it."""
    (run / RESULT).write_text(json.dumps(result, indent=2))
    (run / "result.sha256").write_text(f"{file_sha256(run / RESULT)}  {RESULT}\n")


def read_result(run: Path) -> dict[str, Any] | None:
    """Return the result of a run; None where there is none, or where it is not what was written."""
    path, sums = run / RESULT, run / "result.sha256"
    if not path.is_file():
        return None
    # runs of older versions have no sum
    if sums.is_file() and sums.read_bytes() != f"{file_sha256(path)}  {RESULT}\n".encode():
        return None
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except ValueError:
        return None


def write_sums(directory: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the SHA-256 of every file below a checkpoint directory into its `training_state/sha256.json`; known: those
    that were computed before."""
    write_json(directory / SUMS, {name: known.get(name) or file_sha256(directory / name) for name in names(directory)})


def names(directory: Path) -> list[str]:
    """Return the files below a checkpoint directory that its sums are of, as paths relative to it."""
    files = (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
    return [path.as_posix() for path in files if path not in (SUMS, PROGRESS)]


def has_sums(directory: Path) -> bool:
    """Return whether a checkpoint has sums; those of older versions have none."""
    return (directory / SUMS).is_file()


def damage(directory: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, in words; None where they are whole, or without sums."""
    if not has_sums(directory):  # an older version wrote it; but the state of the run it wrote, too
        return None if (directory / STATE).is_file() else f"{STATE} is missing"
    try:
        sums = dict(json.loads((directory / SUMS).read_text(encoding="utf8")))
    except (ValueError, TypeError):
        return f"{SUMS} is damaged"
    if missing := sorted(sums.keys() - names(directory)):
        return f"{missing[0]} is missing"
    if changed := [name for name in sums if file_sha256(directory / name) != sums[name]]:
        return f"{', '.join(changed)} is not what was saved (its SHA-256 differs)"
    try:
        read_progress(directory)
    except ValueError:
        return f"{PROGRESS} is damaged"
    return None


def check_models(directories: Iterable[Path], most_bytes: float = math.inf) -> None:
    """Compare the files of models, or of an adapter and its base, as `check_model` does."""
    for directory in directories:
        check_model(directory, most_bytes)


def check_model(directory: Path, most_bytes: float = math.inf) -> None:
    """Compare the files of a model with the sums that were saved with it, where it has some.

    Raises ValueError for weights that differ; says so for other files, which may have been changed by hand. Files of
    more than `most_bytes` are not read.
    """
    if not has_sums(directory):
        return
    try:
        sums = dict(json.loads((directory / SUMS).read_text(encoding="utf8")))
    except (ValueError, TypeError):
        say(f"{directory / SUMS} is damaged: the files of the model are not compared with it")
        return
    changed = []
    for name, expected in sums.items():
        path = directory / name
        if Path(name).parts[0] != SUMS.parts[0] and not (path.is_file() and path.stat().st_size > most_bytes):
            changed += [] if path.is_file() and file_sha256(path) == expected else [name]
    what = "missing or not what was saved (its SHA-256 differs)"
    if weights := [name for name in changed if name.endswith((".safetensors", ".bin", ".distcp", "/.metadata"))]:
        raise ValueError(
            f"{directory / weights[0]} is {what}, so it is damaged: copy it again; if you changed it yourself, remove "
            f"{directory / SUMS}"
        )
    if changed:
        say(f"{directory}: {', '.join(changed)} is {what}: damaged, or changed by hand")


def write_progress(directory: Path, progress: dict) -> None:
    """Write the progress of a run into a checkpoint that is on the disk already, in one step."""
    write_sealed(directory / PROGRESS, progress)


def read_progress(directory: Path) -> dict | None:
    """Return what `write_progress` wrote, None where it was not called. Raises ValueError where it is damaged."""
    try:
        return read_sealed(directory / PROGRESS)
    except ValueError as error:
        raise ValueError(f"{error}: remove it, and the last evaluation is done again") from None

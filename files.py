"""Files that survive a kill: written aside, synced and renamed, so that the old one or the new one stands there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """A scratch directory that becomes `directory` when the block ends well, and is removed when it does not."""
    aside, replaced = (directory.with_name(f".{directory.name}.{role}") for role in ("writing", "replaced"))

    def tidy() -> None:
        if replaced.exists() and not directory.exists():  # stopped between the two renames below
            replaced.rename(directory)
        for path in (aside, replaced):
            shutil.rmtree(path, ignore_errors=True)

    tidy()
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        if directory.exists():  # the same step saved again
            directory.rename(replaced)
        aside.rename(directory)
        sync(directory.parent)
    except (SafetensorError, RuntimeError, OSError) as error:  # how the libraries say that the disk is full
        raise OSError(f"could not write {directory}, what was saved before is as it was: {error}") from error
    finally:
        tidy()


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point(link: Path, target: Path) -> None:
    """Make the symbolic link `link` lead to its neighbour `target`, replacing an older one in one step."""
    aside = link.with_name(f".{link.name}.link")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name)
    aside.replace(link)


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep other processes from working in `directory` (made if need be) within the block, or until this one is killed.

    Raises ValueError where another is at work. A file system without locks lets everybody in.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in {directory}: wait for it, or stop it") from None
        except OSError:  # such as NFS, which locks no directory
            pass
        yield
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a file in one step: a kill leaves the old or the new one."""
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2).encode("utf8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def json_line(value: dict[str, Any]) -> bytes:
    """One line of JSON Lines; half a surrogate pair, which UTF-8 cannot hold, stays the escape it came as."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf8", "backslashreplace")

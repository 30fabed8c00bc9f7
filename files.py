"""Writing such that a kill or a full disk leaves the old file or the new one, never half of one; and a lock.

Each function that replaces something writes beside it, forces that to the disk (fsync) and renames it, because a rename
is the one step that a file system does as a whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

LEAST_FREE = 2**20  # bytes on a disk that is not full
MOST_DIGITS = 300  # of a whole number in the JSON files of others

# ---- directories


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """Yield an empty directory to write into, which replaces `directory` when the block ends without an error.

    After an error it is removed, and `directory` is as it was. Raises OSError when the disk is full.
    """
    aside, replaced = place_aside(directory), directory.with_name(f".{directory.name}.replaced")

    def tidy() -> None:
        if replaced.exists() and not directory.exists():  # a kill between the two renames below: undo the first
            replaced.rename(directory)
        for path in (aside, replaced):
            shutil.rmtree(path, ignore_errors=True)

    tidy()  # after a process that was killed
    aside.mkdir(parents=True)
    try:
        with explained(directory):
            yield aside
            for path in aside.rglob("*"):
                if path.is_file():  # some libraries write files that other users cannot read
                    path.chmod(0o666 & ~umask())
            for path in [*aside.rglob("*"), aside]:
                sync(path)
            if directory.exists():  # the same step saved again; a rename replaces no directory that is not empty
                directory.rename(replaced)
            aside.rename(directory)
            sync(directory.parent)
    finally:
        tidy()


def place_aside(directory: Path) -> Path:
    """Return where `written_aside` lets a directory be written."""
    return directory.with_name(f".{directory.name}.writing")


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Raise OSError that says what could not be written, where the block fails to write `directory`."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as error:  # a full disk, in the words of three libraries
        why = reason(error, directory.parent)
        raise OSError(f"could not write {directory}, what was saved before is as it was: {why}") from error


def reason(error: Exception, directory: Path) -> str:
    """Return why writing into `directory` failed; a full disk is called so, however little a library says of it.

    NumPy says "65536 requested and 54056 written"; what was written fills the disk until it is removed.
    """
    with suppress(OSError):
        if shutil.disk_usage(directory).free < LEAST_FREE:
            return f"the disk is full ({error}); free some space, then repeat the command"
    return str(error)


@contextmanager
def files_aside(*paths: Path) -> Iterator[list[Path]]:
    """Yield a path to write for each of `paths`, which it becomes when the block ends without an error.

    After an error none of them is there. Raises FileExistsError where one exists, and OSError when the disk is full.
    """
    if there := [path for path in paths if path.exists()]:
        raise FileExistsError(f"{there[0]} exists already: choose another, or remove it")
    asides = [path.with_name(f".{path.name}.writing") for path in paths]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    try:
        yield asides
        for aside, path in zip(asides, paths):
            sync(aside)
            aside.replace(path)
        sync(paths[0].parent)
    except (RuntimeError, OSError) as error:
        raise OSError(f"could not write {paths[0]}: {reason(error, paths[0].parent)}") from error
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)


def check_place(out: Path) -> None:
    """Raise OSError where --out could not be made in the end: it would lie below a file, or where nobody may write."""
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"--out {out}: {above} is a file, where a folder is expected; choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: no permission to write to {above}; choose another --out")


def umask() -> int:
    """Return the bits that this process leaves out of the mode of new files."""
    mask = os.umask(0)  # the system has no call that only reads it
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, from memory to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point(link: Path, target: Path) -> None:
    """Make the symbolic link `link` lead to `target` in the same directory; an older link is replaced in one step."""
    aside = link.with_name(f".{link.name}.link")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name)  # without its directory, so that a run can be moved as a whole
    aside.replace(link)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Lock `directory` for this process until the block ends or the process is killed; make it where it is missing.

    Raises ValueError when another process holds the lock. Where the file system has no locks, there is no protection.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in {directory}: wait for it, or stop it") from None
        except OSError:  # a file system without locks on directories, such as NFS
            pass
        yield
    finally:
        os.close(handle)  # which releases the lock


# ---- JSON


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a JSON file of ours holds; None where there is no such file. ValueError names a damaged one."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again, or remove it") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that somebody else may have written; ValueError names the file otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf8"), parse_int=whole_number)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested deeper than Python reads
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold an object, found {type(content).__name__}")
    return content


def whole_number(digits: str) -> int:
    """Return the number of a text of digits; ValueError for one that no float holds, with which nothing can compute."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, {digits[:20]}...")
    return int(digits)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, or replace it in one step."""
    with _replacing(path) as file:
        # backslashreplace: half of a surrogate pair, which UTF-8 cannot hold, is written as its escape
        file.write(json.dumps(value, ensure_ascii=False, indent=2).encode("utf8", "backslashreplace"))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, or replace it in one step."""
    with _replacing(path) as file:
        file.write(text.encode("utf8", "backslashreplace"))


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write bytes into, which becomes `path` when the block ends without an error."""
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_sealed(path: Path, progress: dict[str, Any]) -> None:
    """Write how far a program has come as a JSON file with its own SHA-256, or replace it in one step."""
    write_json(path, {"progress": progress, "sha256": digest_of(progress)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `write_sealed` wrote, None where there is no such file. Raises ValueError where it is damaged."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf8"))
        if stored["sha256"] == digest_of(stored["progress"]):
            return stored["progress"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged")


def digest_of(progress: dict[str, Any]) -> str:
    """Return the hex SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(progress).encode()).hexdigest()


def json_line(value: dict[str, Any]) -> bytes:
    """Return one line of a JSON Lines file, whatever the value holds.

    Half surrogate pairs are written as in `write_json`, dates and other objects as their text, NaN as NaN.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # keys that are no texts, lists in themselves, too deep
        text = json.dumps({str(key): each if isinstance(each, str) else repr(each) for key, each in value.items()})
    return (text + "\n").encode("utf8", "backslashreplace")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file of ours that name a "step"; [] where there is no file.

    Lines that a kill has cut off or a disk has damaged are left out.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf8", errors="replace").split("\n"):
        with suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def write_json_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file of any values, or replace it in one step."""
    with _replacing(path) as file:
        file.writelines(map(json_line, values))

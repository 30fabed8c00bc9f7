"""The checkpoints of a run, and what in them resumes training."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch

STEP_DIR = re.compile(r"step_(\d{8})")


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Write what resumes training (tensors, numbers, strings, containers of them) into a checkpoint directory."""
    path = directory / "training_state" / "state.pt"
    path.parent.mkdir()
    torch.save(state, path)


def load_state(directory: Path) -> dict[str, Any]:
    """The training state in a checkpoint; never unpickles anything but tensors and plain containers."""
    path = directory / "training_state" / "state.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no training state: it can start a run, but not resume one")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read: it is truncated, damaged, or holds more than tensors and plain values; "
            "let `last` lead to an older checkpoint of the run, or start anew with --train.resume never"
        ) from error


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator a step might use, in tensors and plain containers."""
    version, words, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoint directories of a run, oldest first."""
    return sorted(path for path in run.glob("step_*") if STEP_DIR.fullmatch(path.name) and path.is_dir())


def newest(run: Path) -> Path | None:
    """What a run goes on from: what its link `last` leads to, or its newest checkpoint where there is no such link (a
    copy may lose links, and a kill may come before the first); None where there is none. ValueError where the link has
    become a folder, or leads nowhere."""
    last = run / "last"
    if last.is_dir() and not last.is_symlink():
        raise ValueError(
            f"{last} should be a link to a checkpoint, and is a folder: the run was copied with its links followed; "
            f"remove {last} and {run / 'best'}, and it goes on from its newest checkpoint"
        )
    if last.is_symlink() and not last.exists():  # which of the other checkpoints to take instead is not ours to say
        left = ", ".join(path.name for path in checkpoints(run)) or "none"
        raise ValueError(
            f"{last} leads to {last.readlink()}, which is not there (checkpoints that are: {left}); let it lead to "
            f"one of them (ln -sfn step_N {last}), or start anew with --train.resume never"
        )
    return last if last.exists() else next(reversed(checkpoints(run)), None)


def prune(run: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`, never those that `last` or `best` lead to; and what a kill left
    half-written or half-removed."""
    linked = {(run / name).resolve() for name in ("last", "best")}
    spare = [path for path in checkpoints(run) if path.resolve() not in linked]
    for path in spare[: max(0, len(checkpoints(run)) - keep)]:
        path.rename(path.with_name(f".{path.name}.removed"))  # a kill leaves no half of it under its name
    for path in run.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)  # NFS keeps what somebody still reads; the next call finds it again

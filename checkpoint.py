"""Model directories and training state on disk.

There is one format for weights, the one the ecosystem reads: a Hugging Face directory (`config.json`,
`model.safetensors`, tokenizer files, `generation_config.json`). What resumes training lies inside it, in
`training_state/`. A directory appears under its name only when it is complete: it is written aside, synced to the
disk and renamed, so that a kill or a full disk at any instant leaves the old checkpoint or the new one, never half.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from foreign import ForeignModel
from hf_config import FAMILY
from model import Transformer
from tokenizer import Tokenizer
from weights import copy_into, read_config
from weights import weight_files as weight_files  # the scripts' identity of a checkpoint

STEP_DIR = re.compile(r"step_(\d{8})")


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


def save_model(
    directory: Path,
    model: Transformer | ForeignModel,
    tokenizer: Tokenizer | None = None,
    stop_ids: list[int] | None = None,
) -> None:
    """Write `model` and its tokenizer as a Hugging Face directory; parameters keep their dtype. `stop_ids` end an
    answer (default: the tokenizer's eos)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        tokenizer.save(directory)
    model.save_pretrained(directory, ids)
    if ids:
        ids["eos_token_id"] = stop_ids or tokenizer.eos_id
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2))


def load_model(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer | ForeignModel:
    """A model from a Hugging Face directory, its parameters in `dtype`: ours for the LLaMA family, transformers' own
    behind the same interface for any other causal LM. Raises ValueError naming what does not fit."""
    kind = read_config(directory).get("model_type", "llama")
    cls = Transformer if kind in FAMILY else ForeignModel
    return cls.from_pretrained(directory, device, dtype)


def load_weights(model: Transformer | ForeignModel, directory: Path) -> None:
    """Copy the weights of a model directory into the parameters that `model` has, which an optimizer may hold."""
    if isinstance(model, Transformer):
        copy_into(model, directory)
    else:
        model.load_weights(directory)


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

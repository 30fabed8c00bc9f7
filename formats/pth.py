"""A model in one `.pth` or `.pt` file: a state of PyTorch as lit-gpt, llama2.c, baby-llama2 and minimind save it.

Such a file holds tensors by name, at its top or under `model`; of optimizers beside them nothing is read. What the
names and the settings beside them mean: formats/states.py. Nothing of a pickle is executed
(checkpoint/pickled_files.py).
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint.pickled_files import load_pickle
from formats.base import Checkpoint, Format
from formats.options import ImportOptions
from formats.states import State, Stored, read_state

INSIDE = ("model", "state_dict", "module", "model_state_dict")  # keys under which the tensors may be
SETTINGS = ("model_args", "config", "hparams")  # keys under which a program keeps the shape of the model


def detect(path: Path) -> bool:
    """Whether a path is a file of `torch.save`, or a directory with lit-gpt's lit_model.pth."""
    path = path / "lit_model.pth" if path.is_dir() else path
    if not path.is_file():
        return False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"  # a pickle of protocol 2: PyTorch before 1.6


def read(path: Path, options: ImportOptions) -> Checkpoint:
    """Return the model in a file; ValueError where it is of no known program, or something about it has to be said."""
    file = path / "lit_model.pth" if path.is_dir() else path
    content = load_pickle(file)
    found, inside = tensors_in(content)
    if not found:
        raise ValueError(f"{file} holds no tensors by name, neither at its top nor under {', '.join(INSIDE)}")
    tensors = {n: Stored(tuple(t.shape), t.dtype, partial(load, file, inside, n)) for n, t in found.items()}
    own = next((content[key] for key in SETTINGS if isinstance(content.get(key), dict)), {})
    return read_state(State(file, tensors, (file.parent,), own, assume=True), options)


def tensors_in(content: Any) -> tuple[dict[str, torch.Tensor], str | None]:
    """Return the tensors of a file by name, {} for none, and the key under which they are (None: at the top)."""
    if not isinstance(content, dict):
        return {}, None
    inside = next((key for key in INSIDE if isinstance(content.get(key), dict)), None)
    found = content[inside] if inside else content
    return {name: tensor for name, tensor in found.items() if torch.is_tensor(tensor)}, inside


def load(file: Path, inside: str | None, name: str) -> torch.Tensor:
    """Read a tensor again from the file, which is mapped anew so that pages in use do not add up."""
    content = load_pickle(file)
    return (content[inside] if inside else content)[name]


FORMAT = Format("pth", "a .pth of lit-gpt, llama2.c, baby-llama2 or minimind", detect, read, asks=True)

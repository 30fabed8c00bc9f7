"""What all formats have in common: a checkpoint whose tensors are computed one by one, when they are asked for.

A reader turns a file into a `Checkpoint`, whose entries have the names of `model.py`; a writer turns these entries into
those of its file. So each format knows itself and `model.py`, and no other format. An entry knows its shape and dtype
before any weight is read: a writer can write its header, and `--dry_run` the whole map, without loading a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.locate import find_tokenizer
from checkpoint.safetensors_files import listed, state_of
from formats.options import Options
from model import Transformer
from model_args import ModelArgs
from tokenizer import Tokenizer

SAFE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TORCH_DTYPES = {name: dtype for dtype, name in SAFE_NAMES.items()}
FLAG_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # values of --dtype


class Entry(NamedTuple):
    """A tensor of a source or a target that is not read yet."""

    shape: tuple[int, ...]
    dtype: str
    """name of the dtype as safetensors and GGUF write it: F32, BF16, Q4_K"""
    sources: tuple[str, ...]
    """names of the tensors that it is made of, in the checkpoint that was read"""
    load: Callable[[], Any]
    """function that reads and returns it: a reader's returns a torch.Tensor on the CPU"""


Entries = dict[str, Entry]


@dataclass
class Checkpoint:
    """A model that was found somewhere: its shape, its tensors by the names of `model.py`, its tokenizer."""

    where: Path
    """file or directory that it was read from, for messages"""
    args: ModelArgs | None
    """shape; None for a model that is none of the LLaMA family, which can only be copied"""
    entries: Entries
    folder: Path | None = None
    """Hugging Face directory that it is; its files beside the weights are copied as they are"""
    config: dict[str, Any] = field(default_factory=dict)
    """contents of its config.json; empty where the source has none"""
    tokenizer: Tokenizer | None = None
    stop_ids: list[int] | None = None
    """ids that end an answer; None: the tokenizer's eos"""
    ignored: tuple[str, ...] = ()
    """names of tensors in the source that say nothing of their own, such as tables of rotary angles"""
    notes: tuple[str, ...] = ()
    """sentences for the user on what the source had and ours does not hold"""

    def with_tokenizer(self) -> Checkpoint:
        """Load the tokenizer in `folder`, where there is one; returns itself."""
        if self.tokenizer is None and self.folder is not None:
            self.tokenizer, self.stop_ids = find_tokenizer(self.folder)
        return self

    def family(self, target: str) -> ModelArgs:
        """Return the shape; ValueError for a model that `target` cannot hold because it is none of the LLaMA family."""
        if self.args is None:
            kind = self.config.get("model_type")
            raise ValueError(f"{self.where} is of model_type {kind!r}: only models of the LLaMA family become {target}")
        return self.args


class Format(NamedTuple):
    """One kind of file or directory."""

    name: str
    title: str
    """what a message calls it"""
    detect: Callable[[Path], bool]
    """whether a path is of this kind, by its contents; raises nothing"""
    read: Callable[..., Checkpoint]
    """a path of this kind to a checkpoint; ValueError or OSError in one sentence otherwise"""
    lay_out: Callable[[Checkpoint, Options], Entries] | None = None
    """entries of the target, by the target's names, in the order of the file; None: this format is only read"""
    write: Callable[[Checkpoint, Entries, Path, Options], None] | None = None
    """write these entries to a path that does not exist; it appears there when it is complete"""
    asks: bool = False
    """whether `read` takes ImportOptions, too: what the source may not say"""


def shapes_of(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors of a model of `model.py`; the head is missing where it is tied."""
    with torch.device("meta"):
        model = Transformer(args, initialize=False)
    return {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}


def check_entries(where: Path, args: ModelArgs, entries: Mapping[str, Entry]) -> None:
    """Raise ValueError naming all tensors that are missing, unknown to a model of this shape, or of other shapes."""
    wanted = shapes_of(args)
    wrong = [f"{n} is {e.shape}, not {wanted[n]}" for n, e in entries.items() if n in wanted and e.shape != wanted[n]]
    faults = {
        "lacks": [name for name in wanted if name not in entries],
        "has, without a place in the model,": [name for name in entries if name not in wanted],
        "has other shapes than its settings say:": wrong,
    }
    if found := [f"{what} {listed(names)}" for what, names in faults.items() if names]:
        raise ValueError(f"{where} is not a whole model: it {'; it '.join(found)}")


def check_used(where: Path, names: Iterable[str], entries: Mapping[str, Entry], ignored: Container[str] = ()) -> None:
    """Raise ValueError that names the tensors of a source that neither became an entry nor may be ignored."""
    used = {source for entry in entries.values() for source in entry.sources}
    if left := [name for name in names if name not in used and name not in ignored]:
        raise ValueError(f"{where} has tensors that have no place in a model of the LLaMA family: {listed(left)}")


def as_dtype(entry: Entry, name: str) -> Entry:
    """Return an entry whose tensor is rounded to the dtype of that name; entries of no floating point stay."""
    if entry.dtype == name or entry.dtype not in TORCH_DTYPES:
        return entry
    return entry._replace(dtype=name, load=lambda: to_dtype(entry.load(), TORCH_DTYPES[name], entry.sources))


def to_dtype(tensor: torch.Tensor, dtype: torch.dtype, names: tuple[str, ...]) -> torch.Tensor:
    """Return a tensor in another dtype; ValueError where a finite number would become infinite."""
    converted = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not converted.isfinite().all():
        largest = tensor[tensor.isfinite()].abs().max().item() if tensor.isfinite().any() else 0.0
        if largest > torch.finfo(dtype).max:
            short = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{' '.join(names)} has a number of {largest:g}, beyond {short}: choose --dtype bf16 or fp32"
            )
    return converted


def map_lines(entries: Mapping[str, Entry]) -> list[str]:
    """Return the lines of `--dry_run`: a table of source, target, shape and dtype."""
    rows = [("source", "target", "shape", "dtype")]
    for name, entry in entries.items():
        few = entry.sources if len(entry.sources) < 3 else (entry.sources[0], "...", entry.sources[-1])
        rows.append((" ".join(few), name, " x ".join(map(str, entry.shape)), entry.dtype))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]

"""Checkpoints of DeepSpeed, whose ZeRO cuts the float32 weights over the ranks.

    ROOT/latest                                                the name of the newest checkpoint
    ROOT/global_step100/mp_rank_00_model_states.pt             names and shapes; weights as the model computes with them
                        [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   rank R's part of the float32 weights
                        zero_pp_rank_R_mp_rank_00_model_states.pt          at stage 3, for each rank

Stages 1 and 2 lay the parameters of a group of the optimizer behind each other and cut the whole into R parts. Stage 3
cuts each parameter into R parts of one size, the last one filled up, and lays the parts of one rank behind each other.
Frozen parameters are beside the names, whole or cut likewise. The files are pickles, of which nothing is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.pickled_files import read_training_file
from formats.base import Checkpoint, Format
from formats.options import ImportOptions
from formats.states import State, Stored, read_state

LATEST = "latest"
FILE = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")
STATE = "optimizer_state_dict"
CUT = "single_partition_of_fp32_groups"  # at stages 1 and 2: a tensor for each group of the optimizer
CUT_EACH = "fp32_flat_groups"  # at stage 3: tensors that follow each other


class Piece(NamedTuple):
    """Some numbers of a flat tensor in a file."""

    file: Path
    keys: tuple[str | int, ...]
    """where the tensor is in the file"""
    start: int
    length: int


class Flat(NamedTuple):
    """A flat tensor in a file; several of them follow each other."""

    file: Path
    keys: tuple[str | int, ...]
    length: int


def directory_of(path: Path) -> Path:
    """Return the directory with the files of a checkpoint: that which `latest` names, or `path` itself."""
    latest = path / LATEST
    if not latest.is_file():
        return path
    return path / latest.read_text(encoding="utf8", errors="replace").strip()


def detect(path: Path) -> bool:
    """Whether a directory holds files of DeepSpeed, or names one that does."""
    return path.is_dir() and any(directory_of(path).glob("*mp_rank_*_model_states.pt"))


def read(path: Path, options: ImportOptions) -> Checkpoint:
    """Return the model in a checkpoint; ValueError where a rank is missing or it is no model of our family."""
    directory = directory_of(path)
    models, optims = files_of(directory, "model"), files_of(directory, "optim")
    model = read_training_file(models[0])
    notes: tuple[str, ...] = ()
    tensors = beside_names(model, models[0])
    if optims:
        tensors |= dict(frozen(model, models)) | dict(trained(model, models[0], optims))
    elif tensors:
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        notes = (f"{directory} has no *_optim_states.pt: the weights are those the model computed with, in {dtype}",)
    else:
        raise ValueError(f"{directory} has no *_optim_states.pt, in which the weights of stage 3 are; copy them, too")
    for name, other in (model.get("shared_params") or {}).items():  # tied weights are there once
        if other in tensors:
            tensors[name] = tensors[other]
    folders = (directory, directory.parent, directory.parent.parent)
    return read_state(State(path, tensors, folders, notes=notes), options)


def files_of(directory: Path, kind: str) -> list[Path]:
    """Return the files of all ranks in order; [] where there are none.

    Raises ValueError where a rank is missing, and for a model that is cut in another way than ZeRO's.
    """
    found: dict[int, Path] = {}
    for path in sorted(directory.glob(f"*{kind}_states.pt")):
        match = FILE.fullmatch(path.name)
        if match is None or int(match[2]):
            what = "tensor parallelism" if match else "pipeline stages or experts"
            raise ValueError(
                f"{path} is of a model cut by {what}, which is not read here: only ZeRO's parts are joined"
            )
        found[int(match[1] or 0)] = path
    for rank in range(max(found, default=-1) + 1):
        if rank not in found:
            raise ValueError(f"{directory} lacks the *_{kind}_states.pt of rank {rank}; copy the whole checkpoint")
    return [found[rank] for rank in sorted(found)]


# ---- where the numbers of a parameter lie


def trained(model: dict[str, Any], file: Path, optims: Sequence[Path]) -> Iterator[tuple[str, Stored]]:
    """Yield name and float32 tensor of every parameter that was trained."""
    states = [read_training_file(path).get(STATE) for path in optims]
    key = next((key for key in (CUT, CUT_EACH) if isinstance(states[0], dict) and key in states[0]), None)
    if key is None or not all(isinstance(each, dict) and key in each for each in states):
        raise ValueError(f"{optims[0]} has no float32 weights of ZeRO ({STATE}, {CUT} or {CUT_EACH})")
    world = states[0].get("partition_count")
    world = max(world) if isinstance(world, list) else world
    if world != len(optims):
        raise ValueError(f"{optims[0].parent} is of {world} ranks, and has *_optim_states.pt of {len(optims)}")
    groups = [{name: tuple(shape) for name, shape in group.items()} for group in model.get("param_shapes") or []]
    flats = [
        [Flat(path, (STATE, key, i), tensor.numel()) for i, tensor in enumerate(state[key])]
        for path, state in zip(optims, states)
    ]
    if len({len(each) for each in flats}) > 1 or (key == CUT and len(flats[0]) != len(groups)):
        raise ValueError(f"{file} and {optims[0].name} are of different models: they have other groups of parameters")
    if key == CUT_EACH:
        yield from cut_each({name: shape for group in groups for name, shape in group.items()}, flats, file)
        return
    paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    for number, group in enumerate(groups):
        yield from cut_together(group, [flat[number] for flat in flats], paddings[number], file)


def cut_together(
    shapes: dict[str, tuple[int, ...]], flats: list[Flat], paddings: list[int], file: Path
) -> Iterator[tuple[str, Stored]]:
    """Yield the parameters of a group that lie behind each other, over the parts of all ranks."""
    step = 2 * len(flats)  # the end is filled up to a multiple of that
    needed = sum(map(math.prod, shapes.values())) + sum(paddings)
    held = sum(flat.length for flat in flats)
    if len(paddings) != len(shapes) or -(-needed // step) != -(-held // step):
        raise contradiction(file, held, needed)
    start = 0
    for (name, shape), padding in zip(shapes.items(), paddings):
        size = math.prod(shape)
        yield name, stored(shape, torch.float32, pieces(flats, start, size))
        start += size + padding


def cut_each(shapes: dict[str, tuple[int, ...]], flats: list[list[Flat]], file: Path) -> Iterator[tuple[str, Stored]]:
    """Yield parameters each of which is cut into a part for every rank."""
    sizes = {name: -(-math.prod(shape) // len(flats)) for name, shape in shapes.items()}  # of a part
    for own in flats:
        if (held := sum(flat.length for flat in own)) != sum(sizes.values()):
            raise contradiction(file, held, sum(sizes.values()))
    start = 0
    for name, shape in shapes.items():
        parts = [piece for own in flats for piece in pieces(own, start, sizes[name])]
        yield name, stored(shape, torch.float32, parts)
        start += sizes[name]


def frozen(model: dict[str, Any], models: list[Path]) -> Iterator[tuple[str, Stored]]:
    """Yield the parameters that were not trained: whole in the first file, or at stage 3 a part in each (stage 1 has
    them beside the names only)."""
    key = "frozen_param_fragments"
    if not model.get("frozen_param_shapes"):
        return
    fragments = [read_training_file(path).get(key) or {} for path in models]
    for name, shape in model["frozen_param_shapes"].items():
        if any(name not in each for each in fragments):
            raise ValueError(f"{models[0].parent} lacks {name}, which was frozen, in a *_model_states.pt")
        parts = [Piece(path, (key, name), 0, own[name].numel()) for path, own in zip(models, fragments)]
        if (held := sum(part.length for part in parts)) < math.prod(shape):
            raise contradiction(models[0], held, math.prod(shape))
        yield name, stored(tuple(shape), fragments[0][name].dtype, parts)


def beside_names(model: dict[str, Any], file: Path) -> dict[str, Stored]:
    """Return the tensors as the model computed with them, where the file holds them: not the parameters of stage 3."""
    tensors = {n: t for n, t in (model.get("module") or {}).items() if torch.is_tensor(t) and t.numel()}
    places = {name: [Piece(file, ("module", name), 0, tensor.numel())] for name, tensor in tensors.items()}
    return {name: stored(tuple(tensor.shape), tensor.dtype, places[name]) for name, tensor in tensors.items()}


def contradiction(file: Path, held: int, needed: int) -> ValueError:
    """Return the error for parts that are not of the sizes that the names have."""
    return ValueError(f"{file} names parameters of {needed:,} numbers, and the files of the ranks hold {held:,}")


# ---- pieces


def pieces(flats: list[Flat], start: int, length: int) -> Iterator[Piece]:
    """Yield where `length` numbers from `start` on lie in tensors that follow each other."""
    begin = 0  # of the present tensor
    for flat in flats:
        first, last = max(start, begin), min(start + length, begin + flat.length)
        if first < last:
            yield Piece(flat.file, flat.keys, first - begin, last - first)
        begin += flat.length


def stored(shape: tuple[int, ...], dtype: torch.dtype, parts: Iterator[Piece] | list[Piece]) -> Stored:
    """Return a tensor that is made of pieces; numbers beyond its size fill up the last piece."""
    return Stored(shape, dtype, partial(join, tuple(parts), shape))


def join(parts: Sequence[Piece], shape: tuple[int, ...]) -> torch.Tensor:
    """Read the pieces of a tensor, the files mapped anew so that pages in use do not add up; return the tensor."""
    flat = torch.cat([read_piece(part) for part in parts])
    return flat[: math.prod(shape)].reshape(shape)


def read_piece(piece: Piece) -> torch.Tensor:
    """Return some numbers of a file, (length,)."""
    found: Any = read_training_file(piece.file)
    for key in piece.keys:
        found = found[key]
    return found.flatten()[piece.start : piece.start + piece.length]


FORMAT = Format("deepspeed", "a checkpoint of DeepSpeed (*_model_states.pt)", detect, read, asks=True)

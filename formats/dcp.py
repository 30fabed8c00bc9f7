"""Checkpoints of torch.distributed.checkpoint, as FSDP, torchtitan and accelerate write them: see
checkpoint/dcp_files.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from checkpoint.dcp_files import METADATA, check_chunks, chunks_of, join, read_metadata
from formats.base import Checkpoint, Format
from formats.options import ImportOptions
from formats.states import State, Stored, read_state, weights_among

INSIDE = "pytorch_model_fsdp_0"  # where accelerate, and so the Trainer of transformers, puts the weights


def directory_of(path: Path) -> Path:
    """Return the directory with the metadata: `path`, or the one in it that accelerate makes."""
    return path if (path / METADATA).is_file() else path / INSIDE


def detect(path: Path) -> bool:
    """Whether a directory holds a checkpoint of torch.distributed.checkpoint."""
    return (directory_of(path) / METADATA).is_file()


def read(path: Path, options: ImportOptions) -> Checkpoint:
    """Return the model in a checkpoint; ValueError where a file is missing or it is no model of our family."""
    directory = directory_of(path)
    metadata = read_metadata(directory / METADATA)
    try:
        shapes = {
            name: tuple(each.size) for name, each in metadata.state_dict_metadata.items() if hasattr(each, "size")
        }
        names = weights_among(shapes) or {name: name for name in shapes}
        chunks = chunks_of(directory, metadata, set(names.values()))
        dtypes = {name: metadata.state_dict_metadata[name].properties.values[0] for name in names.values()}
    except (AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{directory / METADATA} is no metadata of torch.distributed.checkpoint: {error}") from None
    check_chunks(directory, shapes, chunks)
    tensors = {
        name: Stored(shapes[theirs], dtypes[theirs], partial(join, chunks[theirs], shapes[theirs], dtypes[theirs]))
        for name, theirs in names.items()
    }
    return read_state(State(path, tensors, (directory, directory.parent)), options)


FORMAT = Format("dcp", "a checkpoint of torch.distributed.checkpoint, as of FSDP (.metadata)", detect, read, asks=True)

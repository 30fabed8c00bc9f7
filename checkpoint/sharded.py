"""Checkpoints to which every process writes its own part of the weights and of the optimizer's moments.

    DIR/sharded/.metadata        of torch.distributed.checkpoint: the parts of each tensor, and where they lie
    DIR/sharded/__R_0.distcp     the parts that rank R has written

Beside the folder lie config.json and the tokenizer, so that the directory is a model's for every script. The tensors
are those of every other checkpoint, named `weights.NAME` and `moments.NAME.KEY`: any number of processes, on any
backend, goes on from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint.dcp_files import METADATA, check_chunks, chunks_of, join, read_metadata
from checkpoint.pickled_files import NAMES
from model import Transformer

FOLDER, SUFFIX = "sharded", ".distcp"
WEIGHTS, MOMENTS = "weights.", "moments."


def files_of(directory: Path) -> list[Path]:
    """Return the files of a sharded checkpoint: the metadata, then those with parts; [] where there is none."""
    folder = directory / FOLDER
    return [folder / METADATA, *sorted(folder.glob(f"*{SUFFIX}"))] if (folder / METADATA).is_file() else []


class ShardedFile:
    """The weights of a sharded checkpoint, with the methods of an opened safetensors file."""

    def __init__(self, path: Path) -> None:
        """Read what `path`, the metadata, says. Raises ValueError where it is damaged, or parts are missing."""
        status = [(each.name, each.stat()) for each in files_of(path.parent.parent)]
        self.tensors = read_entries(path, tuple((name, each.st_mtime_ns, each.st_size) for name, each in status))

    def keys(self) -> list[str]:
        """Return the names of all weights."""
        return [name.removeprefix(WEIGHTS) for name in self.tensors if name.startswith(WEIGHTS)]

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read the parts of a weight; return it whole."""
        return self.tensors[WEIGHTS + name].read()

    def get_slice(self, name: str) -> ShardedTensor:
        """Return what `get_shape` and `get_dtype` describe."""
        return self.tensors[WEIGHTS + name]


class NoTensors:
    """What a file with parts holds by itself, with the methods of an opened safetensors file: the metadata name all."""

    def __init__(self, path: Path) -> None:
        """Take the path, as the others do."""

    def keys(self) -> list[str]:
        """Return no names."""
        return []


class ShardedTensor:
    """A tensor that is not read yet; its shape and dtype in safetensors' words."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> None:
        self.shape, self.dtype, self.read = shape, dtype, read

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the name of the dtype."""
        return NAMES.get(self.dtype, str(self.dtype))


@lru_cache(maxsize=2)
def read_entries(path: Path, status: tuple) -> dict[str, ShardedTensor]:
    """Return the tensors that the metadata in `path` describe, by name; status: of all files, for the cache."""
    metadata = read_metadata(path)
    try:
        shapes = {name: tuple(each.size) for name, each in metadata.state_dict_metadata.items()}
        chunks = chunks_of(path.parent, metadata, set(shapes))
        dtypes = {name: metadata.state_dict_metadata[name].properties.values[0] for name in shapes}
    except (AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    check_chunks(path.parent, shapes, chunks)
    return {
        name: ShardedTensor(shape, dtypes[name], partial(join, chunks[name], shape, dtypes[name]))
        for name, shape in shapes.items()
    }


class Unread(Mapping[str, Any]):
    """Values that are read from the disk each time that they are looked up."""

    def __init__(self, readers: dict[str, Callable[[], Any]]) -> None:
        self.readers = readers

    def __getitem__(self, name: str) -> Any:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


class Sharded:
    """The sharded checkpoints of `model`, for the loop."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def start(
        self,
        directory: Path,
        weights: Mapping[nn.Parameter, torch.Tensor],
        moments: Mapping[str, Mapping[str, torch.Tensor]],
        rank: int,
        gather: Callable[[Any], list[Any]],
    ) -> Any:
        """Copy what this process is to write to the memory of the CPU; return its `sharded_writer.Share`.

        weights: by parameter of the model, moments by name; each whole, or this rank's part of it (DTensor). gather:
        function that returns the object of every rank; every rank calls `start`.
        """
        from checkpoint.sharded_writer import Share  # its library takes time to import

        names = {p: name for name, p in self.model.named_parameters()}
        tensors = {WEIGHTS + names[p]: tensor for p, tensor in weights.items()}
        tensors |= {f"{MOMENTS}{name}.{key}": each for name, values in moments.items() for key, each in values.items()}
        in_order = dict(sorted(tensors.items()))  # the same bytes, whether a run has gone on or not
        return Share(directory / FOLDER, in_order, rank, gather)

    def moments(self, directory: Path) -> dict[str, Mapping[str, torch.Tensor]]:
        """Return the moments in a checkpoint by name of the parameter, read one by one; {} where it is not sharded."""
        if not files_of(directory):
            return {}
        found: dict[str, dict[str, Callable[[], Any]]] = {}
        for name, tensor in ShardedFile(directory / FOLDER / METADATA).tensors.items():
            if name.startswith(MOMENTS):
                parameter, _, key = name.removeprefix(MOMENTS).rpartition(".")
                found.setdefault(parameter, {})[key] = tensor.read
        return {name: Unread(readers) for name, readers in found.items()}


def saver_of(model: nn.Module) -> Sharded | None:
    """Return what saves and reads sharded checkpoints of `model`; None where it is not a LLaMA trained in full."""
    whole = isinstance(model, Transformer) and all(p.requires_grad for p in model.parameters())
    return Sharded(model) if whole else None

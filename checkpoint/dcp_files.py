"""The files of torch.distributed.checkpoint: what their metadata says, and their chunks of tensors.

    DIR/.metadata       a pickle: shape and dtype of every tensor, its chunks, and where each of them lies
    DIR/__0_0.distcp    chunks of tensors, each as `torch.save` writes one; a file or several for each rank

Of the metadata only plain values are read: its classes become `Record`, which runs nothing, and a pickle that names
anything else is refused before it is looked up.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.pickled_files import asked_for, first_sentence

METADATA = ".metadata"


class Record:
    """Stands for an object of torch.distributed.checkpoint: what the pickle gives it, as attributes."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        """Take the attributes; TensorProperties has a tuple of them."""
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = state


class Chunk(NamedTuple):
    """A box of a tensor, and where it lies."""

    file: Path
    offset: int
    length: int
    """number of bytes"""
    starts: tuple[int, ...]
    sizes: tuple[int, ...]


class MetadataReader(pickle.Unpickler):
    """Reads a .metadata file without running anything of it."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name in the pickle; UnpicklingError for one that no metadata has."""
        if module.startswith(("torch.distributed.", "pathlib")) or (module, name) == (
            "torch.serialization",
            "_get_layout",
        ):
            return Record
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_metadata(path: Path) -> Any:
    """Return the metadata as a `Record`; ValueError where the pickle asks for more, or is damaged."""
    try:
        with path.open("rb") as file:
            return MetadataReader(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or a pickle that asks for more than metadata, of which nothing was "
            f"run: {error}"
        ) from None
    except (EOFError, ValueError, TypeError, AttributeError, LookupError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None


def chunks_of(directory: Path, metadata: Any, wanted: set[str]) -> dict[str, list[Chunk]]:
    """Return the chunks of each tensor that is wanted; ValueError for ones that are compressed."""
    sizes = {
        (name, tuple(chunk.offsets)): tuple(chunk.sizes)
        for name in wanted
        for chunk in metadata.state_dict_metadata[name].chunks
    }
    found: dict[str, list[Chunk]] = {name: [] for name in wanted}
    for index, info in metadata.storage_data.items():
        if index.fqn not in wanted:
            continue
        key = (index.fqn, tuple(index.offset))
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{directory}: {index.fqn} is stored compressed, which is not read here")
        file = directory / Path(info.relative_path).name
        found[index.fqn].append(Chunk(file, info.offset, info.length, key[1], sizes[key]))
    return found


def check_chunks(directory: Path, shapes: dict[str, tuple[int, ...]], chunks: dict[str, list[Chunk]]) -> None:
    """Raise ValueError where chunks do not make up their tensor, and for files that are missing or too short."""
    ends: dict[Path, int] = {}
    for name, own in chunks.items():
        inside = all(a + n <= size for chunk in own for a, n, size in zip(chunk.starts, chunk.sizes, shapes[name]))
        if not inside or sum(math.prod(chunk.sizes) for chunk in own) != math.prod(shapes[name]):
            raise ValueError(f"{directory}: the chunks of {name} do not make up its shape {shapes[name]}")
        for chunk in own:
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.length)
    for file, end in ends.items():
        if not file.is_file():
            raise ValueError(f"{file} is missing: copy the whole checkpoint, with the files of all ranks")
        if file.stat().st_size < end:
            raise ValueError(f"{file} is truncated: it has {file.stat().st_size:,} bytes and should have {end:,}")


def join(chunks: list[Chunk], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Read the chunks of a tensor; return it whole."""
    whole = torch.empty(shape, dtype=dtype)
    for chunk in chunks:
        box = tuple(slice(start, start + size) for start, size in zip(chunk.starts, chunk.sizes))
        whole[box] = read_chunk(chunk)
    return whole


def read_chunk(chunk: Chunk) -> torch.Tensor:
    """Return a chunk of a file; ValueError where it is damaged or of another size than the metadata say."""
    with chunk.file.open("rb") as file:
        file.seek(chunk.offset)
        stored = io.BytesIO(file.read(chunk.length))
    try:
        tensor = torch.load(stored, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        if asked := asked_for(error):
            raise ValueError(
                f"{chunk.file} is refused: at byte {chunk.offset:,} is a pickle that asks for {asked}, and nothing of "
                "it was run"
            ) from None
        raise ValueError(f"{chunk.file} is damaged at byte {chunk.offset:,}: {first_sentence(error)}") from None
    if not torch.is_tensor(tensor) or tuple(tensor.shape) != chunk.sizes:
        raise ValueError(f"{chunk.file} has another tensor at byte {chunk.offset:,} than .metadata says")
    return tensor

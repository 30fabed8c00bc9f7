"""Write the weights of a model directory tensor by tensor, so that memory holds one tensor at a time.

The `safetensors` package writes a file from tensors that are all in memory. A file is: 8 bytes, the length n of the
header (little-endian); n bytes of JSON, which map each name to its dtype, shape and place; the numbers, row by row.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from checkpoint.locate import CONFIG
from checkpoint.safetensors_files import INDEX, SINGLE, split

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes


@runtime_checkable
class Stored(Protocol):
    """What has to be known of a tensor before it is read: shape, dtype by safetensors' name, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]


def write_streamed(directory: Path, config: dict[str, Any], tensors: Mapping[str, Any], max_shard_bytes: int) -> None:
    """Write `config.json` and the weights into an empty directory: one file, or above `max_shard_bytes` several with an
    index. tensors: name -> `Stored`."""
    if unknown := [name for name, tensor in tensors.items() if tensor.dtype not in SIZES]:
        raise ValueError(f"{unknown[0]} is of dtype {tensors[unknown[0]].dtype}, which cannot be written here")
    sizes = {name: n_bytes(tensor) for name, tensor in tensors.items()}
    shards = split(sizes, max_shard_bytes)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file, names in zip(files, shards):
        write_file(directory / file, {name: tensors[name] for name in names})
    if count > 1:
        places = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2))
    (directory / CONFIG).write_text(json.dumps(config, indent=2))


def n_bytes(tensor: Stored) -> int:
    """Return the bytes that a tensor takes in a file."""
    size = SIZES[tensor.dtype]
    for length in tensor.shape:
        size *= length
    return size


def write_file(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write one safetensors file; name -> `Stored`. Raises ValueError where a tensor is not what its entry says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at := at + n_bytes(tensor)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            file.write(numbers_of(name, tensor))


def numbers_of(name: str, tensor: Stored) -> np.ndarray:
    """Read a tensor; return its bytes, row by row. Raises ValueError where it is not what its entry says."""
    loaded = tensor.load().contiguous()
    if tuple(loaded.shape) != tuple(tensor.shape) or loaded.nbytes != n_bytes(tensor):
        raise ValueError(f"{name} should be {tuple(tensor.shape)} of {tensor.dtype}, found {tuple(loaded.shape)}")
    return loaded.reshape(-1).view(torch.uint8).numpy()

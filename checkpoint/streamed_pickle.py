"""Write a file of `torch.save` tensor by tensor, so that memory holds one tensor at a time.

`torch.save` wants all tensors in memory. What it writes is a zip archive without compression: `data.pkl` is the pickled
object, in which a tensor is its shape, its strides and the number of a storage; `data/0`, `data/1`, ... are the numbers
of the storages, each at a multiple of 64 bytes, so that it can be mapped; `version` and `byteorder` are what they say.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.streamed import Stored, n_bytes, numbers_of

STORAGES = {
    "F64": torch.DoubleStorage,
    "F32": torch.FloatStorage,
    "F16": torch.HalfStorage,
    "BF16": torch.BFloat16Storage,
    "I64": torch.LongStorage,
    "I32": torch.IntStorage,
    "I16": torch.ShortStorage,
    "I8": torch.CharStorage,
    "U8": torch.ByteStorage,
    "BOOL": torch.BoolStorage,
}
ALIGNMENT = 64  # of numbers in the file
ROOT = "archive"  # name of the folder in the archive, which torch.load takes as it is
LOCAL_HEADER, ZIP64_FIELD = 30, 20  # bytes before a member's name; of the field with sizes of more than 32 bits
PADDING = b"FB"  # the extra field that torch pads with


class Storage(NamedTuple):
    """Where the numbers of a tensor lie: `data/NUMBER`."""

    number: int
    tensor: Stored


class Pickler(pickle.Pickler):
    """Pickles an object in which `Stored` stand for tensors, as `torch.save` pickles tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        """Write to `file` in protocol 2, as torch does: the one that `torch.load(weights_only=True)` reads."""
        super().__init__(file, protocol=2)
        self.storages: list[Storage] = []

    def reducer_override(self, value: Any) -> Any:
        """Return the function that makes a tensor, and what it is called with."""
        if isinstance(value, type) or not isinstance(value, Stored):
            return NotImplemented
        if value.dtype not in STORAGES:
            raise ValueError(f"a tensor of dtype {value.dtype} cannot be written here")
        shape = tuple(value.shape)
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        self.storages.append(Storage(len(self.storages), value))
        return torch._utils._rebuild_tensor_v2, (self.storages[-1], 0, shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        """Return the five words that stand for a storage; None for everything else."""
        if not isinstance(value, Storage):
            return None
        size = prod(value.tensor.shape)
        return "storage", STORAGES[value.tensor.dtype], str(value.number), "cpu", size


def write_pickle(path: Path, value: Any) -> None:
    """Write dicts, lists and plain settings with tensors among them, each given as a `Stored` that is read when its
    turn comes. ValueError where a tensor is not what its `Stored` says."""
    buffer = io.BytesIO()
    pickler = Pickler(buffer)
    pickler.dump(value)
    small = {"data.pkl": buffer.getvalue(), "version": b"3\n", "byteorder": sys.byteorder.encode()}
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, text in small.items():
            archive.writestr(member(name, file.tell(), len(text)), text)
        for number, tensor in pickler.storages:
            with archive.open(member(f"data/{number}", file.tell(), n_bytes(tensor)), "w") as place:
                place.write(numbers_of(f"tensor {number} of {path.name}", tensor))


def member(name: str, at: int, size: int) -> zipfile.ZipInfo:
    """Return a member of an archive whose header begins at byte `at`, and whose `size` bytes then begin at a multiple
    of 64: its extra field is as long as that needs."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}")
    info.file_size = size
    large = ZIP64_FIELD if size * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile's own rule
    fill = -(at + LOCAL_HEADER + len(info.filename) + large + 4) % ALIGNMENT
    info.extra = PADDING + struct.pack("<H", fill) + b"Z" * fill
    return info

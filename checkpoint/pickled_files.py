"""PyTorch's own weight files, `pytorch_model.bin`: pickles, of which only tensors are read and nothing is run.

A pickle is a program. `torch.load(weights_only=True)` follows the few instructions that build tensors, and stops at any
other before it is executed.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

NAMES = {  # dtypes by safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def load_pickle(path: Path) -> Any:
    """Return what a file of `torch.save` holds, tensors mapped into memory.

    Raises ValueError where it asks for more than tensors, numbers, texts and containers, or is damaged.
    """
    try:
        # files of PyTorch before 1.6 are no zip archives, and are read as a whole
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is refused: it is a pickle that asks for {asked[1] if asked else 'more than tensors'} when it "
            "is read, and nothing of it was run; take the model's safetensors files"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read as PyTorch weights (truncated or damaged): {reason}") from None


class PickledFile:
    """The tensors of a `.bin` file, with the methods of an opened safetensors file."""

    def __init__(self, path: Path) -> None:
        """Map the file into memory. Raises ValueError where it holds anything but tensors by name, or is damaged."""
        state = load_pickle(path)
        if not isinstance(state, dict) or not all(torch.is_tensor(each) for each in state.values()):
            raise ValueError(f"{path} should hold tensors by name, found something else: is it a file of weights?")
        self.state: dict[str, torch.Tensor] = state

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self.state)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, a view of the mapped file."""
        return self.state[name]

    def get_slice(self, name: str) -> PickledTensor:
        """Return what `get_shape` and `get_dtype` describe."""
        return PickledTensor(self.state[name])

    def metadata(self) -> None:
        """Return None: a pickle has no metadata."""


class PickledTensor:
    """Shape and dtype of a tensor, in safetensors' words."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        """Return the name of the dtype."""
        return NAMES.get(self.tensor.dtype, str(self.tensor.dtype))


class Inert:
    """Stands for any class or function of another program that a pickle names; it keeps nothing and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        """Return an object without contents, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Take any arguments."""

    def __setstate__(self, state: object) -> None:
        """Take any state."""


def read_training_file(path: Path) -> dict[str, Any]:
    """Return the dict in a file of `torch.save` that holds more than tensors: settings in an argparse.Namespace, enums,
    random states. Everything but tensors and plain values becomes `Inert`, so that nothing of the file is run.

    Tensors are mapped. Raises ValueError for a file that is truncated, damaged or no zip archive.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = [(Inert, name) for name in names if name != "argparse.Namespace"]
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, pickle.UnpicklingError) and (asked := re.search(r"(?:module|GLOBAL) (\S+)", str(error))):
            raise ValueError(
                f"{path} is refused: it is a pickle that asks for {asked[1]}, and nothing of it was run"
            ) from None
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint (truncated or damaged): {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} should hold a dict, found {type(state).__name__}")
    return state

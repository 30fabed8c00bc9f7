"""PyTorch's own weight files, `pytorch_model.bin`: pickles, of which only tensors are read and nothing is run.

A pickle is a program. `torch.load(weights_only=True)` follows the few instructions that build tensors, and stops at any
other before it is executed.
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING  # Python 2's names of modules, which torch.save writes
from pathlib import Path
from typing import Any

import torch

NAMES = {  # dtypes by safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# Of Python itself, settings and states are made of these.
PLAIN_MODULES = ("argparse", "collections", "copy_reg", "copyreg", "datetime", "decimal", "enum", "pathlib")
PLAIN = {"_codecs.encode", "_io.BytesIO", "functools.partial", "io.BytesIO", "signal.Signals", "types.SimpleNamespace"}
TYPES = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list", "object"}
TYPES |= {"range", "set", "slice", "str", "tuple"}
PLAIN |= {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in TYPES}


def asked_for(error: Exception) -> str | None:
    """Return the name of what a pickle asked for and did not get; None where the error is another one."""
    found = isinstance(error, pickle.UnpicklingError) and re.search(r"(?:module|GLOBAL) ([^\s,]+)", str(error))
    return found[1] if found else None


def check_beginning(path: Path) -> None:
    """Raise ValueError for a file that is neither an archive nor a pickle, such as the page of a server without it."""
    with path.open("rb") as file:
        begins = file.read(8)
    if not begins:
        raise ValueError(f"{path} is an empty file, of 0 bytes: copy or download it again")
    if not begins.startswith((b"PK", b"\x80")):
        raise ValueError(
            f"{path} is no file of torch.save: it begins with the bytes {begins.hex(' ')}; download it again"
        )


def first_sentence(error: Exception) -> str:
    """Return what an error of PyTorch says first; advice follows that is not for the user of a script."""
    return re.split(r"\n|\. ", str(error).strip())[0]


def load_pickle(path: Path) -> Any:
    """Return what a file of `torch.save` holds, tensors mapped into memory.

    Raises ValueError where it asks for more than tensors, numbers, texts and containers, or is damaged.
    """
    check_beginning(path)
    try:
        # files of PyTorch before 1.6 are no zip archives, and are read as a whole
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is a pickle that asks for {asked_for(error) or 'more than tensors'} when it "
            "is read, and nothing of it was run; take the model's safetensors files"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = first_sentence(error)
        raise ValueError(f"{path} cannot be read as PyTorch weights (truncated or damaged): {why}") from None


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


def is_to_run(name: str) -> bool:
    """Whether a pickle can name this only to have it called: something of Python itself that is no plain value."""
    module = name.rpartition(".")[0].partition(".")[0]
    of_python = module in sys.stdlib_module_names or module in IMPORT_MAPPING
    return of_python and module not in PLAIN_MODULES and name not in PLAIN


def read_training_file(path: Path) -> dict[str, Any]:
    """Return the dict in a file of `torch.save` that holds more than tensors: settings in an argparse.Namespace, enums,
    random states. Everything but tensors and plain values becomes `Inert`, so that nothing of the file is run.

    Tensors are mapped. Raises ValueError for a file that is truncated, damaged or no zip archive, and for one that asks
    for more of Python than settings are made of: only what wants to be executed does.
    """
    check_beginning(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if wanting := [name for name in names if is_to_run(name)]:
            raise pickle.UnpicklingError(f"GLOBAL {wanting[0]}")
        stand_ins = [(Inert, name) for name in names if name != "argparse.Namespace"]
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        if asked := asked_for(error):
            raise ValueError(
                f"{path} is refused: it is a pickle that asks for {asked}, and nothing of it was run"
            ) from None
        why = first_sentence(error)
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint (truncated or damaged): {why}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} should hold a dict, found {type(state).__name__}")
    return state

"""The data of llm-lite-trainer, `name_0.bin` and `name_0.idx`: pickles, of which nothing is executed.

The .bin is one pickle after another, the .idx a pickled list of their first bytes. An item is

    an array (L,)                of pretraining: the next L ids of all documents of the file, one after the other
    two arrays (L,), ids, labels the last item of pretraining, and every item of questions and answers; labels are -100
                                 where ids are padding or a question

A pickle is a program that may call whatever it names. Here, arrays and dtypes of NumPy are stood for by classes
of this file, which only keep what they are given; any other name is refused before it is looked up.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100  # label of ids that are not trained
DTYPES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4")
Item = tuple[np.ndarray, np.ndarray | None]


class Dtype:
    """Stands for numpy.dtype in a pickle."""

    def __init__(self, name: str = "", *_: Any) -> None:
        self.name, self.order = name, "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def resolved(self) -> np.dtype:
        """Return the dtype. Raises ValueError for one that is not of whole numbers."""
        if self.name not in DTYPES or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"expected ids of whole numbers, found dtype {self.name!r:.50}")
        return np.dtype(self.order.replace("|", "=") + self.name)


class Array:
    """Stands for numpy.ndarray in a pickle."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state[1:]  # shape, dtype, whether in Fortran's order, bytes

    def resolved(self) -> np.ndarray:
        """Return the array (n,). Raises ValueError where it has another number of axes, or does not fit its bytes."""
        shape, dtype, _, raw = self.state
        if len(shape) != 1 or not isinstance(dtype, Dtype) or not isinstance(raw, (bytes, bytearray)):
            raise ValueError(f"expected arrays of one axis, found shape {shape!r:.50}")
        values = np.frombuffer(raw, dtype.resolved())
        if len(values) != shape[0]:
            raise ValueError(f"expected {shape[0]} ids, found {len(values)}")
        return values


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """Stand for NumPy's function of that name, which protocol 5 of pickles uses."""
    array = Array()
    array.state = (shape, dtype, False, bytes(raw))
    return array


def _latin1(text: str, *_: Any) -> bytes:
    """Stand for _codecs.encode, by which protocol 2 of pickles writes bytes."""
    return text.encode("latin1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): Dtype,
    ("numpy", "ndarray"): Array,
    ("numpy", "_reconstruct"): Array,
    ("numpy", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _latin1,
}


class Inert(pickle.Unpickler):
    """An unpickler that can build arrays, numbers, texts, tuples and lists, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name; ValueError for every name but those of STAND_INS."""
        if (stand_in := STAND_INS.get((module.partition(".")[0], name))) is None:
            raise ValueError(f"it is a pickle that asks for {module}.{name}, and nothing of it was run")
        return stand_in


def loads(data: bytes, where: str) -> Any:
    """Return what a pickle holds, without executing anything. Raises ValueError that begins with `where`."""
    try:
        return Inert(io.BytesIO(data)).load()
    except ValueError as error:
        raise ValueError(f"{where} is refused: {error}") from None
    except Exception as error:  # truncated or damaged data stop the unpickler with errors of any kind
        raise ValueError(f"{where} is truncated or damaged: {error}") from None


def items(path: Path) -> Iterator[Item]:
    """Yield (ids, labels or None) of each item of a .bin file. Raises ValueError for a file of another kind."""
    index, size = path.with_suffix(".idx"), path.stat().st_size
    offsets = loads(index.read_bytes(), str(index))
    if not isinstance(offsets, list) or any(type(offset) is not int for offset in offsets):
        raise ValueError(f"{index}: expected a pickled list of offsets, found {type(offsets).__name__}")
    bounds = [*offsets, size]
    if bounds[0] != 0 or any(first >= last for first, last in itertools.pairwise(bounds)):
        raise ValueError(f"{index}: its offsets should rise from 0 to below the {size} bytes of {path.name}; copy both")
    with path.open("rb") as file:
        for number, (first, last) in enumerate(itertools.pairwise(bounds)):
            where = f"{path}: item {number}"
            item = loads(file.read(last - first), where)
            try:
                yield resolved(item)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def resolved(item: Any) -> Item:
    """Return the arrays of an item. int16 stores ids above 32767 as negative numbers, which are put right here."""
    arrays = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(arrays[0], Array) or not isinstance(arrays[1], (Array, type(None))):
        raise ValueError(f"expected an array of ids, or one of ids and one of labels, found {type(item).__name__}")
    ids, labels = (each.resolved() if each else None for each in arrays)
    if labels is not None and len(labels) != len(ids):
        raise ValueError(f"expected as many labels as ids, found {len(labels)} and {len(ids)}")
    return ids.view(ids.dtype.str.replace("i2", "u2")), labels


def of_conversations(path: Path) -> bool:
    """Return whether a file holds questions and answers: its first ids are a question, which has no labels."""
    _, labels = next(items(path), (None, None))
    return labels is not None and len(labels) > 0 and labels[0] == IGNORED


def blocks(path: Path) -> Iterator[np.ndarray]:
    """Yield the ids of a file of pretraining, without padding.

    Where its ids fill whole rows, llm-lite-trainer writes all of them once more into its last item, of which only the
    last row is new.
    """
    length = 0
    for ids, labels in items(path):
        if labels is not None:
            ids = ids[labels != IGNORED]
            if length and len(ids) > length:
                ids = ids[-length:]
        length = len(ids)
        yield ids


def exchanges(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids of a question, ids of its answer) of a file of questions and answers; a row may hold several."""
    for ids, labels in items(path):
        if labels is None:
            raise ValueError(f"{path}: expected labels in every item, as in the first")
        if not len(ids):
            continue
        masked = labels == IGNORED
        edges = [0, *(np.flatnonzero(np.diff(masked)) + 1).tolist(), len(ids)]
        runs = [ids[first:last] for first, last in itertools.pairwise(edges)]
        if not masked[0]:
            runs.insert(0, ids[:0])
        yield from zip(runs[::2], runs[1::2])  # padding at the end has no answer after it

"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-split layout of Hugging Face's LLaMA, and the
methods that stretch it over longer texts: one small file for each.

Dimension i of a head is paired with dimension i + D/2; the pair is rotated by the angle `position * theta^(-2i/D)`.
Meta's checkpoints pair neighbours (2i, 2i+1) instead; the two layouts differ by a permutation of the rows of W_q, W_k.

Nothing here is a buffer of the model: `model.bfloat16()` would round a stored frequency, and the angles of positions in
the thousands would be wrong by whole radians. Angles are computed in float32 from Python floats, at every call.

Two lengths are distinguished. `max_seq_len` is the length of the longest text that a model accepts. The window
(`original_max_position_embeddings` of a scaling entry) is the length of its training texts before it was stretched.

Frequencies of `dynamic`, `longrope` and `clex` depend on the length of the text. When a text grows token by token, all
keys are rotated with the frequencies of the present length, but the layers below computed their states for earlier
tokens with the frequencies of shorter texts; a forward pass over the whole text uses its full length everywhere. Within
the window both give the same; beyond it, they do when the full length is fixed beforehand (`text_len` of a cache).
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from typing import Any

from rope.base import FAMILIES, Rope, cos_sin, fixed, ntk_theta, register, rotate, text_lengths
from rope.clex import Clex
from rope.keys import COUNT, WINDOW, check_keys, is_number, nearest

__all__ = [
    "FAMILIES",
    "Clex",
    "Rope",
    "cos_sin",
    "extend",
    "fixed",
    "make",
    "ntk_theta",
    "register",
    "rope_type",
    "rotate",
    "text_lengths",
]

for _name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"rope.{_name}")  # every file registers its family


def rope_type(scaling: dict[str, Any] | None) -> str:
    """Return the type of a `rope_scaling` entry, from its key `rope_type` or the older `type`; "default" for None."""
    scaling = scaling or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def without_type(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Return the keys of a `rope_scaling` entry other than its type."""
    return {key: value for key, value in (scaling or {}).items() if key not in ("rope_type", "type")}


def make(head_dim: int, theta: float, scaling: dict[str, Any] | None, max_seq_len: int) -> Rope | Clex:
    """Make the position encoding of a `rope_scaling` entry as config.json writes it (None: no scaling).

    head_dim: D, dimensions of a head; theta: base of the frequencies; max_seq_len: length of the longest text.
    Raises ValueError for an unknown type or key, a missing key, or values that contradict each other.
    """
    name = rope_type(scaling)
    if not isinstance(name, str):
        raise ValueError(f"rope_scaling: the type should be a name, found {name!r}")
    if not (is_number(theta) and theta > 1):
        raise ValueError(f"rope_theta should be a number above 1, found {theta!r}")
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"rope_scaling asks for type {name!r}; {nearest(name, FAMILIES)}known types are {known}")
    if (older := (scaling or {}).get("type")) not in (None, name):
        raise ValueError(f"rope_scaling names two types, rope_type {name!r} and type {older!r}; remove one")
    # files of Hugging Face write null for a key that is absent
    entry = {key: value for key, value in without_type(scaling).items() if value is not None}
    family = FAMILIES[name]
    check_keys(name, entry, family.required, family.optional, max_seq_len)
    try:
        return family.make(head_dim, theta, entry, max_seq_len)
    except (OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"rope_scaling of type {name!r} has no frequencies for {entry} ({error})") from None


def extend(
    scaling: dict[str, Any] | None, old_len: int, new_len: int, type: str | None = None, factor: float | None = None
) -> dict[str, Any]:
    """Return the `rope_scaling` entry that stretches a checkpoint from texts of `old_len` tokens to `new_len`.

    scaling: entry of the checkpoint (None: no scaling); type: of the new entry (None: the checkpoint's, or yarn);
    factor: new length / window (None: exactly what new_len needs). Raises ValueError when there is nothing to extend,
    the factor does not reach new_len, or the checkpoint is stretched by another type.
    """
    old, old_type = without_type(scaling), rope_type(scaling)
    name = type or (old_type if old_type != "default" else "yarn")
    check_extension(name, old_type)
    family = FAMILIES[name]
    if factor is None and new_len <= old_len:
        raise ValueError(f"max_seq_len {new_len} is no longer than the checkpoint's {old_len}: nothing to extend")
    # an entry without a window states only its factor; the window follows from it
    has_window = WINDOW in family.required | family.optional
    window = old.get(WINDOW) or max(1, round(old_len / (1 if has_window else old.get("factor", 1))))
    factor = new_len / window if factor is None else factor
    # the frequencies of some families (dynamic, llama3) reach beyond factor * window
    if family.bounded and factor < new_len / window:
        raise ValueError(
            f"factor {factor:g} on a window of {window} covers {math.floor(factor * window)} positions, "
            f"max_seq_len is {new_len}; ask for {new_len / window:g}"
        )
    # CLEX counts whole windows in `max_factor`; every other family stretches by a number `factor`
    size_key = "factor" if "factor" in family.required else "max_factor"
    size = {size_key: math.ceil(factor) if family.required[size_key] is COUNT else factor}
    if not has_window:
        return {"rope_type": name} | size
    return {"rope_type": name} | dict(family.defaults) | old | size | {WINDOW: window}


def check_extension(name: str, old_type: str) -> None:
    """Raise ValueError unless a checkpoint of type `old_type` can be extended by the type `name`."""
    if old_type not in ("default", name):
        raise ValueError(f"--rope.type {name} does not go with a checkpoint stretched by {old_type!r}: keep that type")
    family = FAMILIES.get(name)
    reason = "there is no such type" if family is None else family.not_extendable
    if reason:
        extendable = ", ".join(sorted(key for key, each in FAMILIES.items() if not each.not_extendable))
        raise ValueError(f"--rope.type {name}: {reason}; choose one of {extendable}")

"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-split layout of Hugging Face's LLaMA, and the ways
to stretch it over longer texts: one small file a family.

Dimension i of a head is paired with dimension i + D/2, and the pair turns by `position * theta^(-2i/D)`. Meta's
checkpoints pair neighbours (2i, 2i+1) instead; the two differ by a permutation of the rows of W_q and W_k.

Nothing here is a buffer of the model: `model.bfloat16()` would round a stored frequency and turn positions in the
thousands by whole radians. Angles are made in float32 from Python floats, at every call.

Two lengths are told apart. `max_seq_len` is the longest text a model is made for; a scaling entry's
`original_max_position_embeddings`, the window, is what it was trained on before it was stretched.

Frequencies of `dynamic`, `longrope` and `clex` depend on the length of the text. When a text grows token by token, all
keys turn with the frequencies of its present length, but what the layers below have made of earlier tokens was made
with the frequencies of its time; a forward pass over the whole text uses its full length throughout. Within the window
the two are the same; beyond it they are the same when the full length is said beforehand (`text_len` of a cache).
"""

from __future__ import annotations

import difflib
import math
from typing import Any

from rope import clex, dynamic, linear, llama3, longrope, ntk, yarn  # noqa: F401  (they register themselves)
from rope.base import FAMILIES, Rope, cos_sin, fixed, ntk_theta, register, rotate, text_lengths
from rope.clex import Clex

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


def rope_type(scaling: dict[str, Any] | None) -> str:
    """The type named by a `rope_scaling` mapping, under its present key `rope_type` or the older `type`."""
    scaling = scaling or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def make(head_dim: int, theta: float, scaling: dict[str, Any] | None, max_seq_len: int) -> Rope | Clex:
    """The encoding of a `rope_scaling` entry as config.json writes it (None: plain), for texts up to `max_seq_len`.

    Raises ValueError for an unknown type or key, one that is missing, or numbers that contradict each other.
    """
    name = rope_type(scaling)
    if not isinstance(name, str):
        raise ValueError(f"rope_scaling: the type should be a name, found {name!r}")
    if not (is_number(theta) and theta > 1):
        raise ValueError(f"rope_theta should be a number above 1, found {theta!r}")
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"rope_scaling asks for type {name!r}; {hint}known types are {', '.join(sorted(FAMILIES))}")
    given = {key: value for key, value in (scaling or {}).items() if value is not None}
    if given.get("type", name) != name:
        raise ValueError(f"rope_scaling names two types, rope_type {name!r} and type {given['type']!r}; drop one")
    given = {key: value for key, value in given.items() if key not in ("rope_type", "type")}
    family = FAMILIES[name]
    if missing := sorted(family.required - given.keys()):
        raise ValueError(f"rope_scaling of type {name!r} needs {', '.join(missing)}, found {sorted(given)}")
    known = family.required | family.optional
    if unknown := sorted(given.keys() - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"rope_scaling of type {name!r} does not know {', '.join(unknown)}; "
            f"{hint}its keys are {', '.join(sorted(known)) or 'none'}"
        )
    for key, value in given.items():
        check_value(name, key, value, max_seq_len)
    try:
        return family.make(head_dim, theta, given, max_seq_len)
    except (OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"rope_scaling of type {name!r} has no frequencies for {given} ({error})") from None


def check_value(name: str, key: str, value: Any, max_seq_len: int) -> None:
    """Raise ValueError unless `value` is one that `key` can have, whatever the others are."""
    whole = key in ("original_max_position_embeddings", "max_factor", "param_factor")
    least = 1 if whole or key == "factor" else 0
    if key in ("truncate", "finetuned"):
        right, wanted = isinstance(value, bool), "true or false"
    elif key == "act":
        right, wanted = isinstance(value, str), "a name"
    elif key in ("short_factor", "long_factor"):
        right = isinstance(value, list | tuple) and all(is_number(v) and v > 0 for v in value)
        wanted = "a list of numbers above 0"
    else:
        right = is_number(value) and (value >= least if least else value > 0) and (not whole or type(value) is int)
        wanted = f"{'a whole' if whole else 'a'} number, {f'at least {least}' if least else 'above 0'}"
    if not right:
        raise ValueError(f"rope_scaling of type {name!r}: {key} should be {wanted}, found {value!r}")
    if key == "original_max_position_embeddings" and value > max_seq_len:
        raise ValueError(
            f"rope_scaling of type {name!r} stretches a window of {value} positions, "
            f"yet max_seq_len is only {max_seq_len}"
        )


def is_number(value: Any) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def extend(
    scaling: dict[str, Any] | None, old_len: int, new_len: int, type: str | None = None, factor: float | None = None
) -> dict[str, Any]:
    """The `rope_scaling` entry that takes a checkpoint from texts of `old_len` tokens to texts of `new_len`.

    scaling: the checkpoint's own entry (None: plain). type: of the new entry; None: as the checkpoint's, else yarn.
    factor: how much longer than the original window; None: as much as new_len asks for. Raises ValueError when there
    is nothing to extend, the factor does not reach new_len, or the checkpoint was stretched in another way already.
    """
    old = {key: value for key, value in (scaling or {}).items() if key not in ("rope_type", "type")}
    old_type = rope_type(scaling)
    name = type or (old_type if old_type != "default" else "yarn")
    if old_type not in ("default", name):
        raise ValueError(f"the checkpoint's positions are stretched by {old_type!r} already; go on with that type")
    if name not in FAMILIES or name in ("default", "longrope"):
        reason = "its factors are found by a search" if name == "longrope" else "it stretches nothing"
        reason = reason if name in FAMILIES else "there is no such type"
        raise ValueError(
            f"positions cannot be extended by type {name!r}: {reason}; "
            f"types that can are {', '.join(sorted(FAMILIES.keys() - {'default', 'longrope'}))}"
        )
    if factor is None and new_len <= old_len:
        raise ValueError(f"max_seq_len {new_len} is no longer than the checkpoint's {old_len}: nothing to extend")
    stretched = old.get("factor", 1) if name in ("linear", "ntk") else 1  # these two do not note their window
    window = old.get("original_max_position_embeddings") or max(1, round(old_len / stretched))
    factor = new_len / window if factor is None else factor
    if name not in ("dynamic", "llama3") and factor < new_len / window:
        raise ValueError(
            f"factor {factor:g} on a window of {window} covers {math.floor(factor * window)} positions, "
            f"max_seq_len is {new_len}; ask for {new_len / window:g}"
        )
    if name in ("linear", "ntk"):
        return {"rope_type": name, "factor": factor}
    known = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}.get(name, {}) | old
    size = {"max_factor": math.ceil(factor)} if name == "clex" else {"factor": factor}
    return {"rope_type": name} | known | size | {"original_max_position_embeddings": window}

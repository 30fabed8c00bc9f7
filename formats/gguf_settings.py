"""The shape of a model in the metadata of a GGUF file, for llama.cpp's architectures `llama`, `qwen2` and `qwen3`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rope
from model_args import ModelArgs
from rope.base import plain

ARCHITECTURES = ("llama", "qwen2", "qwen3")
OWN_ROPE = "little_llama.rope_scaling"  # our entry as JSON, beside the tensor of frequencies, which does not name it
FREQUENCIES = "rope_freqs.weight"  # (D/2,) float32: plain frequencies divided by those of the model


class Field(NamedTuple):
    """One entry of the metadata: the type as in the names of GGUFWriter's methods, and the value."""

    kind: str
    value: Any


def architecture_of(args: ModelArgs) -> str:
    """Return llama.cpp's architecture for a shape."""
    return "qwen3" if args.qk_norm else "qwen2" if args.attention_bias else "llama"


def write(args: ModelArgs, where: Path) -> dict[str, Field]:
    """Return the metadata of a shape; ValueError that names what llama.cpp's architecture does not compute."""
    arch = architecture_of(args)
    if args.sliding_window is not None and args.sliding_window < args.max_seq_len:
        raise ValueError(
            f"{where} has a sliding window of {args.sliding_window} of its {args.max_seq_len} tokens: llama.cpp's "
            f"architecture {arch} attends to all of them"
        )
    fields = {
        "context_length": Field("uint32", args.max_seq_len),
        "embedding_length": Field("uint32", args.dim),
        "block_count": Field("uint32", args.n_layers),
        "feed_forward_length": Field("uint32", args.hidden_dim),
        "attention.head_count": Field("uint32", args.n_heads),
        "attention.head_count_kv": Field("uint32", args.n_kv_heads),
        "attention.layer_norm_rms_epsilon": Field("float32", args.norm_eps),
        "attention.key_length": Field("uint32", args.head_dim),
        "attention.value_length": Field("uint32", args.head_dim),
        "rope.dimension_count": Field("uint32", args.head_dim),
        "rope.freq_base": Field("float32", args.rope_theta),
        "vocab_size": Field("uint32", args.vocab_size),
    }
    named = {f"{arch}.{key}": field for key, field in fields.items()}
    return named | write_rope(args, arch, where)


def write_rope(args: ModelArgs, arch: str, where: Path) -> dict[str, Field]:
    """Return the metadata on stretched positions; ValueError for a kind that llama.cpp does not compute."""
    scaling = args.rope_scaling
    kind = rope.rope_type(scaling)
    if scaling is None or kind == "default":
        return {}
    if kind == "ntk":
        theta = rope.ntk_theta(args.head_dim, args.rope_theta, scaling["factor"])
        return {f"{arch}.rope.freq_base": Field("float32", theta)}
    if kind == "linear":
        return {
            f"{arch}.rope.scaling.type": Field("string", "linear"),
            f"{arch}.rope.scaling.factor": Field("float32", scaling["factor"]),
        }
    known = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    if kind == "yarn" and scaling.keys() <= known:
        fields = {
            "type": Field("string", "yarn"),
            "factor": Field("float32", scaling["factor"]),
            "original_context_length": Field("uint32", scaling["original_max_position_embeddings"]),
            "yarn_beta_fast": Field("float32", scaling.get("beta_fast", 32.0)),
            "yarn_beta_slow": Field("float32", scaling.get("beta_slow", 1.0)),
        }
        return {f"{arch}.rope.scaling.{key}": field for key, field in fields.items()}
    if kind == "llama3" and arch == "llama":
        return {OWN_ROPE: Field("string", json.dumps(scaling))}
    others = ", ".join(sorted(scaling.keys() - known)) if kind == "yarn" else ""
    what = f"rope_type {kind}" + (f" with {others}" if others else "")
    raise ValueError(f"{where} has {what}, which llama.cpp's architecture {arch} does not compute")


def frequencies(args: ModelArgs) -> torch.Tensor | None:
    """Return the factors (D/2,) by which llama.cpp divides the plain frequencies; None where it needs none."""
    if rope.rope_type(args.rope_scaling) != "llama3":
        return None
    return factors_of(args.rope_scaling, args.head_dim, args.rope_theta, args.max_seq_len)


def factors_of(scaling: dict[str, Any] | None, head_dim: int, theta: float, length: int) -> torch.Tensor:
    """Return plain frequencies divided by those of a rope_scaling entry, (D/2,) float32."""
    own, _ = rope.make(head_dim, theta, scaling, length).frequencies(length)
    return torch.tensor([before / float(after) for before, after in zip(plain(head_dim, theta), own)])


def read(fields: dict[str, Any], where: Path, vocab_size: int, tied: bool, factors: torch.Tensor | None) -> ModelArgs:
    """Return the shape in the metadata of a file.

    vocab_size, tied: as the tensors say. factors: the tensor of frequencies, where the file has one. Raises ValueError
    for an architecture that is not known here, a missing key, or a computation that ours does not do.
    """
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"{where} is of the architecture {arch!r}; of GGUF files, {', '.join(ARCHITECTURES)} are read here"
        )

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        if value is None:
            raise ValueError(f"{where} lacks {arch}.{key} in its metadata")
        if not isinstance(value, int | float | str):
            raise ValueError(f"{where}: {arch}.{key} differs from layer to layer, which ours does not do")
        return value

    for key in ("expert_count", "attention.sliding_window"):
        if fields.get(f"{arch}.{key}"):
            raise ValueError(f"{where} has {arch}.{key} {fields[f'{arch}.{key}']}, which is not read here")
    heads = get("attention.head_count")
    head_dim = get("attention.key_length", get("embedding_length") // max(heads, 1))
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"{where} turns {get('rope.dimension_count')} of {head_dim} dimensions of a head: ours turns all"
        )
    theta = number(get("rope.freq_base", 10000.0))
    length = get("context_length")
    scaling = read_rope(fields, arch, where, length)
    if factors is not None:
        scaling = llama3_of(fields, where, head_dim, theta, length, factors)
    try:
        return ModelArgs(
            dim=get("embedding_length"),
            n_layers=get("block_count"),
            n_heads=heads,
            n_kv_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            vocab_size=vocab_size,
            hidden_dim=get("feed_forward_length"),
            norm_eps=number(get("attention.layer_norm_rms_epsilon")),
            max_seq_len=length,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=tied,
            attention_bias=arch == "qwen2",
            qk_norm=arch == "qwen3",
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def number(value: float) -> float:
    """Return a float32 as the shortest decimal number that is rounded to it: 1e-05 and not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def read_rope(fields: dict[str, Any], arch: str, where: Path, length: int) -> dict[str, Any] | None:
    """Return the rope_scaling that the metadata name, None where positions are plain; length: of the context."""
    entry = {key: fields.get(f"{arch}.rope.scaling.{key}") for key in ("type", "factor", "original_context_length")}
    if entry["type"] in (None, "none") or not entry["factor"]:
        return None
    if entry["type"] == "linear":
        return {"rope_type": "linear", "factor": number(entry["factor"])}
    if entry["type"] != "yarn":
        raise ValueError(f"{where} stretches its positions by {entry['type']}, which is not read from GGUF here")
    scaling = {"rope_type": "yarn", "factor": number(entry["factor"])}
    scaling["original_max_position_embeddings"] = entry["original_context_length"] or round(length / entry["factor"])
    for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (value := number(fields.get(f"{arch}.rope.scaling.yarn_{key}", usual))) != usual:
            scaling[key] = value
    return scaling


def llama3_of(
    fields: dict[str, Any], where: Path, head_dim: int, theta: float, length: int, factors: torch.Tensor
) -> dict[str, Any]:
    """Return the entry of Llama 3.1 whose frequencies a file holds: ours, or the published one; else ValueError."""
    usual = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    candidates = [usual | {"original_max_position_embeddings": 8192}]
    if OWN_ROPE in fields:
        candidates.insert(0, json.loads(fields[OWN_ROPE]))
    for scaling in candidates:
        if torch.allclose(factors_of(scaling, head_dim, theta, length), factors, rtol=1e-4):
            return scaling
    raise ValueError(f"{where}: {FREQUENCIES} holds other frequencies than those of Llama 3.1, which ours cannot name")

"""Adapters as GGUF files for llama.cpp's `--lora` and Ollama's ADAPTER: the two factors of each layer.

llama.cpp adds alpha / rank * B A to a weight, with one alpha for the file and the rank of each layer; other scalings
(rsLoRA, an alpha of a layer) are multiplied into B.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch

from checkpoint import config_json
from checkpoint.adapter_config import in_pattern, read_adapter_config
from checkpoint.locate import find_base, read_config
from checkpoint.peft import PREFIX, read_tensors
from checkpoint.safetensors_files import listed
from files import files_aside
from formats import gguf
from formats.base import Checkpoint, Entries, Entry, Format
from formats.gguf_settings import Field, architecture_of
from formats.meta_names import heads_of, neighbours, translate
from formats.options import Options

A, B = ".lora_A.weight", ".lora_B.weight"


def read(path: Path, base: Path | None = None) -> Checkpoint:
    """Return the tensors of a PEFT directory, by its names without the prefix, with the shape of its base model.

    Raises ValueError for what llama.cpp's adapters do not hold: DoRA, and modules that are trained in full.
    """
    config, folder = read_adapter_config(path), find_base(path, base)
    try:
        args = config_json.read(read_config(folder))
    except ValueError as error:
        raise ValueError(f"{path} is an adapter of {folder}, which is not of the LLaMA family: {error}") from None
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(path).items()}
    if others := [name for name in tensors if not name.endswith((A, B)) or name.startswith(("model.embed", "lm_head"))]:
        raise ValueError(
            f"{path} trains {listed(others)}, which adapters of llama.cpp do not hold: merge it (convert.py merge), "
            "and export the model"
        )

    def entry(name: str, tensor: torch.Tensor) -> Entry:
        return Entry(tuple(tensor.shape), "F32", (name,), partial(tensor.to, torch.float32))

    entries = {name: entry(name, tensor) for name, tensor in tensors.items()}
    return Checkpoint(path, args, entries, config=config)


def lay_out(checkpoint: Checkpoint, options: Options) -> Entries:
    """Return the factors by GGUF's names, in float32 or, as `--dtype` says, in 16 bits."""
    args, config = checkpoint.family("an adapter in GGUF"), checkpoint.config
    kind = gguf.FLAG_NAMES.get(options.dtype, "F32")
    permuted = architecture_of(args) == "llama"
    entries: Entries = {}
    for name, entry in checkpoint.entries.items():
        end = A if name.endswith(A) else B
        layer = name.removesuffix(end)
        target = translate(f"{layer}.weight", gguf.NAMES)
        if target is None or layer + (B if end == A else A) not in checkpoint.entries:
            raise ValueError(f"{checkpoint.where} has {name}, which has no place or no other half in a GGUF file")
        r = in_pattern(config["rank_pattern"], layer, config["r"])
        alpha = in_pattern(config["alpha_pattern"], layer, config["lora_alpha"])
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        factor = scaling * r / config["lora_alpha"] if end == B else 1.0
        # the rows of q and k that change places are those of B (out, r)
        heads = heads_of(f"{layer}.weight", args.n_heads, args.n_kv_heads) if permuted and end == B else None
        load = partial(encoded, entry, factor, heads, kind)
        entries[f"{target}.{'lora_a' if end == A else 'lora_b'}"] = Entry(entry.shape, kind, (name,), load)
    return entries


def encoded(entry: Entry, factor: float, heads: int | None, kind: str) -> np.ndarray:
    """Return a factor as the array that is written."""
    weight = entry.load() * factor
    if heads is not None:
        weight = neighbours(weight, heads)
    return gguf.gguf_quants.encode(weight.numpy(), kind)


def write(checkpoint: Checkpoint, entries: Entries, out: Path, options: Options) -> None:
    """Write the adapter."""
    fields = {
        "general.type": Field("string", "adapter"),
        "adapter.type": Field("string", "lora"),
        "adapter.lora.alpha": Field("float32", float(checkpoint.config["lora_alpha"])),
        "general.name": Field("string", out.stem),
    }
    with files_aside(out) as aside:
        gguf.write_file(aside[0], architecture_of(checkpoint.family("an adapter in GGUF")), fields, entries)


FORMAT = Format("gguf", "an adapter in a GGUF file", lambda path: False, read, lay_out, write)

"""Model directories and training state on disk.

There is one format for weights, the one the ecosystem reads: a Hugging Face directory (`config.json`,
`model.safetensors`, tokenizer files, `generation_config.json`). What resumes training lies inside it, in
`training_state/`. A directory appears under its name only when it is complete: it is written aside, synced to the
disk and renamed, so that a kill or a full disk at any instant leaves the old checkpoint or the new one, never half.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from checkpoint import peft
from checkpoint import peft as peft_files
from checkpoint.config_json import FAMILY
from checkpoint.safetensors_files import copy_into, read_config
from checkpoint.safetensors_files import weight_files as weight_files  # the scripts' identity of a checkpoint
from checkpoint.transformers_model import TransformersModel
from lora import adapters
from model import Transformer
from tokenizer import Tokenizer


def save_model(
    directory: Path,
    model: Transformer | TransformersModel,
    tokenizer: Tokenizer | None = None,
    stop_ids: list[int] | None = None,
) -> None:
    """Write `model` and its tokenizer as a Hugging Face directory; parameters keep their dtype. `stop_ids` end an
    answer (default: the tokenizer's eos)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        tokenizer.save(directory)
    model.save_pretrained(directory, ids)
    if ids:
        ids["eos_token_id"] = stop_ids or tokenizer.eos_id
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2))


def load_model(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer | TransformersModel:
    """A model from a Hugging Face directory, its parameters in `dtype`: ours for the LLaMA family, transformers' own
    behind the same interface for any other causal LM. Raises ValueError naming what does not fit."""
    kind = read_config(directory).get("model_type", "llama")
    cls = Transformer if kind in FAMILY else TransformersModel
    return cls.from_pretrained(directory, device, dtype)


def load_weights(model: Transformer | TransformersModel, directory: Path) -> None:
    """Copy the weights of a model directory into the parameters that `model` has, which an optimizer may hold."""
    if isinstance(model, Transformer):
        copy_into(model, directory)
    else:
        model.load_weights(directory)


def load_adapted(adapter: Path, base: Path) -> Transformer:
    """The model in `base` with an adapter in its weights, which are first quantized where the adapter was trained on
    quantized ones; the sum is made in float32."""
    model = load_model(base)
    tree = getattr(model, "inner", model)  # an adapter's file has the names that transformers gives to modules
    adapters.quantize_base(tree, *peft_files.base_kind(adapter))
    peft.load(tree, adapter)
    adapters.merge_for_good(tree)
    return model


def kept_dtype(directory: Path) -> torch.dtype:
    """The dtype in which the model in a directory is kept."""
    kept = read_config(directory)
    return getattr(torch, kept.get("dtype") or kept.get("torch_dtype") or "float32")

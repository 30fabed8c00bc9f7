"""Make one kind of model directory out of others.

python convert.py merge --model DIR --adapter DIR --out DIR
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import config
import lora
from checkpoint import load_model, save_model, written_aside
from lora.peft_files import read_config as read_adapter_config
from tokenizer import Tokenizer, load_tokenizer
from trainer import DTYPES
from weights import read_config


@dataclass(frozen=True)
class Merge:
    """Put an adapter into the weights of the model it was trained on; a plain Hugging Face directory is written."""

    model: Path
    """directory of the model that the adapter belongs to"""
    adapter: Path
    """PEFT directory: adapter_config.json and adapter_model.safetensors"""
    out: Path
    """directory to write"""
    base: Literal["full", "nf4", "fp4", "int8"] = "full"
    """full: add to the weights as they are; else to what quantizing leaves of them, as in training with --lora.base"""
    double_quant: bool = True
    """as in training"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of what is written (the sum is made in fp32); auto: as the model is kept now"""


def merge(args: Merge) -> dict[str, Any]:
    """Write the merged model; returns where it lies."""
    read_adapter_config(args.adapter)  # says what is wrong with it before a model is read
    if args.out.exists():
        raise ValueError(f"{args.out} exists already; choose another --out, or remove it")
    model = load_model(args.model)
    tree = getattr(model, "inner", model)  # an adapter's file has the names that transformers gives to modules
    if args.base != "full":
        lora.quantize_base(tree, args.base, args.double_quant)
    lora.load(tree, args.adapter)
    lora.merge_for_good(tree)
    check_ties(model, args)
    kept = read_config(args.model)
    dtype = DTYPES.get(args.dtype) or getattr(torch, kept.get("dtype") or kept.get("torch_dtype") or "float32")
    tokenizer, stop_ids = find_tokenizer(args.adapter, args.model)
    with written_aside(args.out) as aside:
        save_model(aside, model.to(dtype), tokenizer, stop_ids)
    print(f"{args.adapter} is merged into {args.model}: {args.out}", flush=True)
    return {"model": str(args.out)}


def check_ties(model: torch.nn.Module, args: Merge) -> None:
    """Raise ValueError when an adapter has trained one of two tied matrices: config.json says that they are one."""
    head = getattr(model, "lm_head", None)
    if head is not None and model.args.tie_embeddings and head.weight is not model.model.embed_tokens.weight:
        raise ValueError(
            f"{args.adapter} trains the embedding apart from the head, and in {args.model} they are tied: "
            "save the model with tie_word_embeddings false and a head of its own first"
        )


def find_tokenizer(*directories: Path) -> tuple[Tokenizer | None, list[int] | None]:
    """The tokenizer of the first directory that has one (the adapter's, if its vocabulary grew), and the ids that end
    an answer."""
    for directory in directories:
        if (directory / "tokenizer.json").is_file() or (directory / "tokenizer.model").is_file():
            path = directory / "generation_config.json"
            stop = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
            return load_tokenizer(directory), [stop] if isinstance(stop, int) else stop
    return None, None


COMMANDS = {"merge": (merge, Merge)}


if __name__ == "__main__":
    command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        config.fail(f"convert.py takes a command, {', '.join(COMMANDS)}, and its flags: convert.py merge --help")
    config.run(*COMMANDS[command], "convert")

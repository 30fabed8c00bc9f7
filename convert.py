"""Make one kind of model directory out of others.

python convert.py merge --model DIR --adapter DIR --out DIR
python convert.py tokens --model DIR --add_special_tokens "<|im_start|>" "<|im_end|>" --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cli.args import parse_command, run


@dataclass(frozen=True)
class Merge:
    """Put an adapter into the weights of the model it was trained on; a plain Hugging Face directory is written."""

    model: Path
    """directory of the model that the adapter belongs to"""
    adapter: Path
    """PEFT directory: adapter_config.json and adapter_model.safetensors"""
    out: Path
    """directory to write"""
    base: Literal["auto", "full", "nf4", "fp4", "int8"] = "auto"
    """full: add to the weights as they are; else to what quantizing leaves of them; auto: to what the adapter was
    trained on, as it tells (PEFT's tell nothing: full)"""
    double_quant: bool = True
    """of nf4 and fp4, unless auto: as in training"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of what is written (the sum is made in fp32); auto: as the model is kept now"""


@dataclass(frozen=True)
class Tokens:
    """Give a model more tokens, each of which starts as the mean of what spelled it so far."""

    model: Path
    """directory of the model"""
    out: Path
    """directory to write"""
    add_tokens: tuple[str, ...] = ()
    """pieces of text (or a file of one a line) that become tokens"""
    add_special_tokens: tuple[str, ...] = ()
    """likewise, tokens that no text gives, such as the markers of a chat template"""
    vocab_multiple_of: int = 1
    """round the vocabulary up to a multiple of this"""


if __name__ == "__main__":
    # before torch is loaded: --help and mistakes are answered at once
    command, arguments = parse_command({"merge": Merge, "tokens": Tokens}, "convert", __doc__)

import torch

from checkpoint import peft
from checkpoint.adapter_config import read_adapter_config
from checkpoint.directory import kept_dtype, load_model, save_model
from checkpoint.extend import grow
from checkpoint.locate import find_model, find_tokenizer
from checkpoint.peft import base_kind
from files import written_aside
from hardware import DTYPES
from lora import adapters


def merge(args: Merge) -> dict[str, Any]:
    """Write the merged model; returns where it lies."""
    adapter = find_model(args.adapter, "give --adapter the directory that holds the adapter")
    read_adapter_config(adapter)  # says what is wrong with it before a model is read
    args = replace(args, adapter=adapter, model=find_model(args.model, "give --model a model directory"))
    check_free(args.out)
    model = load_model(args.model)
    tree = getattr(model, "inner", model)  # an adapter's file has the names that transformers gives to modules
    kind = base_kind(args.adapter) if args.base == "auto" else (args.base, args.double_quant)
    adapters.quantize_base(tree, *kind)
    peft.load(tree, args.adapter)
    adapters.merge_for_good(tree)
    check_ties(model, args)
    dtype = DTYPES.get(args.dtype) or kept_dtype(args.model)
    tokenizer, stop_ids = find_tokenizer(args.adapter, args.model)
    with written_aside(args.out) as aside:
        save_model(aside, model.to(dtype), tokenizer, stop_ids)
    print(f"{args.adapter} is merged into {args.model} (base: {kind[0]}): {args.out}", flush=True)
    return {"model": str(args.out)}


def tokens(args: Tokens) -> dict[str, Any]:
    """Write the larger model; returns where it lies."""
    if not args.add_tokens and not args.add_special_tokens:
        raise ValueError("there are no tokens to add: name them with --add_tokens or --add_special_tokens")
    args = replace(args, model=find_model(args.model, "give --model a model directory"))
    check_free(args.out)
    model, (tokenizer, stop_ids) = load_model(args.model), find_tokenizer(args.model)
    if tokenizer is None:
        raise FileNotFoundError(f"{args.model} has no tokenizer to add tokens to")
    added = (args.add_tokens, args.add_special_tokens)
    tokenizer, told = grow(model, tokenizer, *added, args.model, args.vocab_multiple_of)
    with written_aside(args.out) as aside:
        save_model(aside, model.to(kept_dtype(args.model)), tokenizer, stop_ids)
    print(f"{args.out}: {told}", flush=True)
    return {"model": str(args.out)}


def check_free(out: Path) -> None:
    """Raise ValueError where something is in the way."""
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out, or remove it")


def check_ties(model: torch.nn.Module, args: Merge) -> None:
    """Raise ValueError when an adapter has trained one of two tied matrices: config.json says that they are one."""
    head = getattr(model, "lm_head", None)
    if head is not None and model.args.tie_embeddings and head.weight is not model.model.embed_tokens.weight:
        raise ValueError(
            f"{args.adapter} trains the embedding apart from the head, and in {args.model} they are tied: "
            "save the model with tie_word_embeddings false and a head of its own first"
        )


COMMANDS = {"merge": (merge, Merge), "tokens": (tokens, Tokens)}


if __name__ == "__main__":
    run(COMMANDS[command][0], arguments)

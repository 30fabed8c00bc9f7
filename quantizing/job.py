"""Quantize a model block by block in memory, and write it: the work of quantize.py and of its ladder."""

from __future__ import annotations

import copy
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from checkpoint import quantized
from checkpoint.directory import save_tokenizer
from checkpoint.quantized_blocks import BegunBlocks
from checkpoint.safetensors_files import weight_files
from cli.progress import Progress, say
from cli.record import file_sha256, to_plain
from evaluation.text_rows import draw_rows
from files import write_json, written_aside
from quant.bitnet import PackedBitLinear
from quant.calibrate import Stream, named, quantize_block
from quant.formats import Scheme
from quant.four_bit import BLOCK
from quant.grid import GridOptions
from quant.kinds import KINDS, METHODS
from quant.linear import QuantizedLinear
from quant.methods import make_scaling, make_solver, pad_feed_forward
from quant.replace import base_layers, need_package
from quantizing.args import Args
from tokenizer import Tokenizer
from training.signals import caught_signals

REPORT = "quantization_report.json"


def write(
    model: nn.Module, tokenizer: Tokenizer, stop_ids: list[int], args: Args, report: dict[str, Any] | None = None
) -> None:
    """Write the directory --out of a quantized model."""
    with written_aside(args.out) as aside:
        ids = save_tokenizer(aside, tokenizer, stop_ids)
        quantized.save(aside, model, scheme_of(model, args), ids)
        if report:
            write_json(aside / REPORT, {"settings": to_plain(args), "layers": report})


def scheme_of(model: nn.Module, args: Args) -> Scheme:
    """Return what the files say of how the layers of a model were quantized."""
    if args.format == "bnb":
        layout = "bnb_8bit" if args.method == "llm_int8" else "bnb_4bit"
        kind = args.method if layout == "bnb_4bit" else "nf4"
        return Scheme(layout, args.bits, threshold=args.threshold, kind=kind, double=args.double_quant)
    if args.method == "bitnet":
        return Scheme("bitnet", kind=next(m.kind for m in model.modules() if isinstance(m, PackedBitLinear)))
    if args.method == "smoothquant":
        return Scheme("int-quantized", 8)
    if args.method == "int8":
        return Scheme(args.format, args.bits, -1, symmetric=True)
    scheme = Scheme(args.format, args.bits, args.group_size, args.symmetric, args.act_order, args.damping)
    if not args.override:
        return scheme
    if args.format == "compressed-tensors":  # its groups have no order: every layer by its name
        layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
        pairs = [(f"{re.escape(name)}$", args.bits_of(name)) for name in layers]
    else:
        first: dict[str, int] = {}  # of two that are equal the first counts
        for pattern, _, bits in (text.rpartition("=") for text in args.override):
            first.setdefault(f".*(?:{pattern})", int(bits))
        pairs = list(first.items())
    return scheme._replace(layers=tuple((pattern, scheme._replace(bits=bits)) for pattern, bits in pairs))


# ---- the layers


def quantize_in_place(
    model: nn.Module, tokenizer: Tokenizer, args: Args, directory: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Quantize every linear layer of `model` but the head; returns the report of each layer by name.

    directory: that of the model; then blocks are kept in a folder beside --out, and those that are there are taken.
    """
    least_zero = 1 if args.format == "gptq" else 0
    searched = args.search and "search" in METHODS[args.method].flags
    grid = GridOptions(args.bits, args.group_size, args.symmetric, searched, least_zero)
    if args.method in KINDS:
        need_package(args.method, f"--method {args.method}")
    if multiple := BLOCK if args.method in ("nf4", "fp4") else 32 if args.format.startswith("gptq") else 0:
        before, missing = model.args.hidden_dim, pad_feed_forward(model, multiple)
        if missing:
            wide = before + missing
            say(f"the feed-forward width {before} is padded with zeros to {wide}, which the format's readers need")
    check_shapes(model, args)
    rows = torch.empty(0, 1, dtype=torch.long)
    if METHODS[args.method].text:
        length = min(args.seq_len or 512, model.args.max_seq_len)
        rows = draw_rows(args.calib, tokenizer, length, args.calib_tokens, args.seed).to(model.device)
        say(f"calibration: {rows.numel():,} tokens in {len(rows)} rows of {rows.shape[1]}")
    begun = None
    if directory and METHODS[args.method].text:
        settings = {
            key: value for key, value in to_plain(args).items() if key not in ("out", "device", "model", "calib")
        }
        weights = [file_sha256(path) for path in weight_files(directory)]
        rows_hash = hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()
        begun = BegunBlocks(begun_folder(args), {"settings": settings, "model": weights, "rows": rows_hash})
    try:
        return quantize_model(model, rows, args, grid, begun)
    except ValueError:  # it would be found again by the same command, which needs no blocks for that
        if begun:
            begun.remove()
        raise


def begun_folder(args: Args) -> Path:
    """Return the folder of blocks that are quantized already."""
    return args.out.with_name(f"{args.out.name}.begun")


@torch.no_grad()
def quantize_model(
    model: nn.Module, rows: torch.Tensor, args: Args, grid: GridOptions, begun: BegunBlocks | None = None
) -> dict[str, dict[str, Any]]:
    """Quantize the blocks of `model` in place, one after another; returns the report of each layer by name.

    It computes in float32, for which one block at a time is converted; what is not quantized keeps its dtype. On
    SIGTERM or SIGINT it ends with SystemExit; blocks that are done stay in `begun`.
    """
    dtype, computed, model.compute_dtype = model.dtype, model.compute_dtype, torch.float32
    stream = make_stream(model, rows, keep_full=args.method == "gptq" and args.propagation > 0)
    solver = make_solver(args, lambda name: replace(grid, bits=args.bits_of(name)))
    scaling, blocks, report, received = make_scaling(args, grid), model.model.layers, {}, []
    kept = [begun is not None and begun.path(number).is_file() for number in range(len(blocks))]
    if any(kept):
        say(f"{begun.folder} has {sum(kept)} of {len(blocks)} blocks already: going on behind them")
    with Progress("quantizing", "layers", 7 * len(blocks), 7 * sum(kept)) as bar, caught_signals(received, world=1):
        for number, block in enumerate(blocks):
            own_weights(block)
            if kept[number]:
                original = copy.deepcopy(block) if stream.full is not None else None
                report |= begun.load(number, block)
                stream.through(block, original)
                block.to(dtype)
                continue
            with named(f"model.layers.{number}"):
                scaling(model, block, stream)
            found = {}
            for name, layer_report in quantize_block(block, stream, solver, f"model.layers.{number}."):
                layer = model.get_submodule(name)
                width = {"bits": getattr(layer, "bits", args.bits), "weights": layer.in_features * layer.out_features}
                found[name] = width | layer_report
                bar.add()
                if received:
                    stop(received[0], number, len(blocks), begun)
            report |= found
            if begun:
                begun.save(number, block, found)
            block.to(dtype)
    model.compute_dtype = computed
    return report


def own_weights(block: nn.Module) -> None:
    """Give a block weights in float32 of its own in the place of those in the mapped file, which methods may change."""
    for parameter in block.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)


def stop(signal_number: int, done: int, blocks: int, begun: BegunBlocks | None) -> NoReturn:
    """End the program after a signal."""
    say(
        f"stopped after {done} of {blocks} blocks"
        + ("; the same command goes on behind them" if begun and done else "")
    )
    raise SystemExit(128 + signal_number)


@torch.no_grad()
def make_stream(model: nn.Module, rows: torch.Tensor, keep_full: bool, batch_tokens: int = 4096) -> Stream:
    """Return the calibration rows (n, T) as hidden states in front of the first block, in batches."""
    batches = rows.split(max(1, batch_tokens // rows.shape[1])) if len(rows) else []
    hidden = [model.embedding(batch).float() for batch in batches]  # (B, T, dim) each

    def call(block: nn.Module, x: torch.Tensor, number: int) -> torch.Tensor:
        return block(x, *model.context_for_rows(batches[number]), None)

    return Stream(call, hidden, [x.clone() for x in hidden] if keep_full else None)


def check_shapes(model: nn.Module, args: Args) -> None:
    """Raise ValueError for layers that the format cannot keep, before anything is computed."""
    grouped = "group_size" in METHODS[args.method].flags or args.method == "qat"
    for text in args.override:
        if not any(re.search(text.rpartition("=")[0], name) for name, _ in base_layers(model)):
            raise ValueError(f"--override {text} fits no layer; a name is, for instance, {base_layers(model)[0][0]}")
    if args.method in ("nf4", "fp4") and model.args.dim % BLOCK:
        say(
            f"rows of {model.args.dim} inputs are no multiple of {BLOCK}: this program reads them right, bitsandbytes' "
            "CPU kernel does not"
        )
    for name, layer in base_layers(model):
        if not layer.weight.isfinite().all():
            raise ValueError(f"--model: the weights of {name} are not finite: its training has diverged")
        size, multiple = args.group_size, 8 if args.format == "awq" else 32
        if args.format == "bitnet" and layer.kind == "b158" and layer.out_features % 4:
            raise ValueError(
                f"--format bitnet keeps four rows a byte, and {name} has {layer.out_features}: choose sides that are "
                "multiples of 4 before training"
            )
        if args.format in ("bnb", "bitnet"):
            continue
        if args.format in ("awq", "compressed-tensors") and grouped and size != -1 and layer.in_features % size:
            raise ValueError(
                f"--group_size {size} does not divide the {layer.in_features} inputs of {name}, which --format "
                f"{args.format} needs: choose a divisor, or -1 for whole rows"
            )
        if args.format != "compressed-tensors" and (layer.in_features % multiple or layer.out_features % multiple):
            raise ValueError(
                f"--format {args.format} keeps layers whose sides are multiples of {multiple}, and {name} is "
                f"{layer.out_features} x {layer.in_features}: choose --format compressed-tensors"
            )

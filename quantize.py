"""Quantize the weights of a model to 2, 3, 4 or 8 bits, and write them in a format that other programs read.

python quantize.py --model DIR --calib corpus.txt --out DIR_4bit                      GPTQ, 4 bits, groups of 128
python quantize.py --model DIR --calib data/tiny/sft_train.jsonl --bits 3 --format compressed-tensors --out DIR_3bit
python quantize.py --model DIR --method awq --calib corpus.txt --format awq --out DIR_awq
python quantize.py --model DIR --method rtn --out DIR_rtn                             rounding, without any text
python quantize.py --model DIR --method nf4 --out DIR_nf4                             bitsandbytes' NF4

eval.py, fine_tuning.py --lora.method and convert.py merge open the result like any other model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from checkpoint.locate import DEFAULT_MODEL, find_model, find_tokenizer
from cli.args import parse, run
from cli.flags import Needs, check_flags
from cli.progress import Progress, say
from quant.kinds import FORMATS, METHODS, OPTIONS

NO_TEXT = "the others look at the weights alone; remove it"
TEXT = tuple(name for name, method in METHODS.items() if method.text)
NEEDS = (
    *(Needs(name, "method", TEXT, NO_TEXT) for name in ("calib", "calib_tokens", "seq_len", "seed")),
    *(
        Needs(flag, "method", tuple(name for name, each in METHODS.items() if flag in each.flags), "remove it")
        for flag in sorted(OPTIONS)
    ),
    Needs("format", "bits", (4,), "its files keep 4 bits", lambda value: value == "awq"),
)


@dataclass(frozen=True)
class Args:
    """Quantize the weights of a model, and write them in a format that other programs read."""

    out: Path
    """directory to write; it must not exist yet"""
    model: Path = DEFAULT_MODEL
    """directory of the model, or of a run (then its best checkpoint)"""
    method: Literal[tuple(METHODS)] = "gptq"  # type: ignore[valid-type]
    """gptq: Frantar et al. 2022, with error propagation (QEP); awq: Lin et al. 2023; rtn: round to nearest, without
    any text; int8: likewise, a scale a row; smoothquant (Xiao et al. 2022): inputs in 8 bits, too; llm_int8
    (Dettmers et al. 2022): the same but for outliers; nf4, fp4 (Dettmers et al. 2023; needs bitsandbytes): 16 uneven
    levels; bitnet: packs what pretrain.py --bitnet has trained, in 2 bits (b158) or 1 (b1)"""
    bits: Literal[2, 3, 4, 8] | None = None
    """bits of a weight. None: 4, or as many as the method has; awq's format has 4 only"""
    group_size: int = 128
    """weights of a row that share a scale; -1: the whole row"""
    symmetric: bool = False
    """put zero in the middle of the codes; False: where the weights of a group ask for it, which loses less"""
    format: Literal[FORMATS] | None = None  # type: ignore[valid-type]
    """layout of the files. gptq: AutoGPTQ's; gptq_v2: the same with true zero points; awq: AutoAWQ's, 4 bits only;
    compressed-tensors: pack-quantized, any shape; bnb: bitsandbytes'. None: gptq, or bnb for llm_int8, nf4 and fp4"""
    calib: tuple[Path, ...] = ()
    """calibration text for gptq and awq: token bins, text files or folders, or conversations in any form"""
    calib_tokens: int = 25_000
    """tokens to calibrate on"""
    seq_len: int = 0
    """tokens in a row of calibration; 0: the model's context, 512 at most"""
    propagation: float = 0.5
    """strength of QEP in gptq, 0 to 1: correct each layer for the error that the layers below it leave"""
    damping: float = 0.01
    """share of the mean second moment that gptq adds, so that it can be inverted"""
    act_order: bool = True
    """gptq rounds the inputs with the largest second moment first"""
    search: bool = True
    """narrow the range of a group where that lowers the error (gptq and rtn)"""
    alpha: float | None = None
    """smoothquant: share of the difficulty that is moved from inputs into weights, 0 to 1; None: searched"""
    threshold: float = 6.0
    """llm_int8: inputs this large are outliers, multiplied in full precision; 0: none are"""
    double_quant: bool = True
    """nf4 and fp4: quantize the scales as well, which then take 0.127 instead of 0.5 bits for each weight"""
    seed: int = 0
    """seed of the choice of calibration rows"""
    device: str = "auto"
    """auto: cuda, else mps, else cpu"""

    def __post_init__(self) -> None:
        """Raise ValueError for flags that do not go together."""
        method = METHODS[self.method]
        object.__setattr__(self, "bits", self.bits or method.bits[0])
        object.__setattr__(self, "format", self.format or method.formats[0])
        for name in ("bits", "format"):
            if getattr(self, name) not in (can := getattr(method, name.removesuffix("s") + "s")):
                raise ValueError(
                    f"--method {self.method} has --{name} {', '.join(map(str, can))}, found {getattr(self, name)}"
                )
        if method.text and not self.calib:
            raise ValueError(f"--method {self.method} needs calibration text: name a file with --calib (or use rtn)")
        check_flags(self, NEEDS)
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"--threshold should be a number from 0 on, found {self.threshold}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"--alpha should be from 0 to 1, found {self.alpha}")
        for name in ("calib_tokens", "seq_len", "seed"):
            if getattr(self, name) < (name == "calib_tokens"):
                raise ValueError(
                    f"--{name} should be {1 if name == 'calib_tokens' else 0} or more, found {getattr(self, name)}"
                )


if __name__ == "__main__":
    arguments = parse(Args, "quantize")  # before torch is loaded: --help and mistakes are answered at once

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from checkpoint import quantized
from checkpoint.directory import load_model, save_tokenizer
from checkpoint.transformers_model import TransformersModel
from evaluation.text_rows import draw_rows
from files import written_aside
from hardware import choose_device
from quant import awq, smooth
from quant.bitnet import PackedBitLinear, kind_of_bits
from quant.calibrate import Solve, Stream, inputs_of, quantize_block
from quant.formats import Scheme
from quant.four_bit import BLOCK, FourBitLinear
from quant.gptq import GPTQOptions, relative_error, solve, solve_nearest
from quant.grid import GridOptions
from quant.grouped import GroupedLinear
from quant.int8 import W8A8Linear, solve_rows
from quant.kinds import KINDS
from quant.linear import QuantizedLinear
from quant.llm_int8 import LLMInt8Linear
from quant.replace import base_layers, need_package, refuse_quantized
from quant.statistics import InputStatistics
from tokenizer import Tokenizer
from training.checksums import MOST_BYTES, check_model


def main(args: Args) -> dict[str, Any]:
    """Quantize every linear layer but the head, and write the directory; returns a report per layer."""
    directory = find_model(args.model, "give --model a model directory")
    check_model(directory, MOST_BYTES)
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already; choose another directory, or remove it")
    device = choose_device(args.device)
    model = load_model(directory, device).eval()
    if isinstance(model, TransformersModel):
        raise ValueError(f"--model {directory} is not of the LLaMA family, which is all that is quantized here")
    refuse_quantized(model, "quantizing them again would add to the error")
    if (kind := kind_of_bits(model)) and args.method != "bitnet":
        raise ValueError(f"--model {directory} is trained in few bits ({kind}): --method bitnet packs it")
    if args.method == "bitnet" and not kind:
        raise ValueError(
            f"--method bitnet packs what pretrain.py --bitnet has trained, and --model {directory} was trained in "
            "full: train it with --bitnet, or choose another method"
        )
    tokenizer, stop_ids = find_tokenizer(directory)
    if tokenizer is None:
        raise FileNotFoundError(f"--model {directory} has no tokenizer to read the calibration text with")
    began = time.monotonic()
    report = quantize_in_place(model, tokenizer, args)
    write(model, tokenizer, stop_ids, args)
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(
        f"{args.out}: {args.method}, {args.bits} bits, {size / 1e6:.2f} MB, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return {"model": str(args.out), "bytes": size, "layers": report}


def write(model: nn.Module, tokenizer: Tokenizer, stop_ids: list[int], args: Args) -> None:
    """Write the directory --out of a quantized model."""
    with written_aside(args.out) as aside:
        ids = save_tokenizer(aside, tokenizer, stop_ids)
        quantized.save(aside, model, scheme_of(model, args), ids)


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
    return Scheme(args.format, args.bits, args.group_size, args.symmetric, args.act_order, args.damping)


# ---- the layers


def quantize_in_place(model: nn.Module, tokenizer: Tokenizer, args: Args) -> dict[str, dict[str, Any]]:
    """Quantize every linear layer of `model` but the head; returns the report of each layer by name."""
    least_zero = 1 if args.format == "gptq" else 0
    grid = GridOptions(args.bits, args.group_size, args.symmetric, args.search and args.method != "awq", least_zero)
    if args.method in KINDS:
        need_package(args.method, f"--method {args.method}")
    if multiple := BLOCK if args.method in ("nf4", "fp4") else 32 if args.format.startswith("gptq") else 0:
        pad_feed_forward(model, multiple)
    check_shapes(model, args)
    rows = torch.empty(0, 1, dtype=torch.long)
    if METHODS[args.method].text:
        length = min(args.seq_len or 512, model.args.max_seq_len)
        rows = draw_rows(args.calib, tokenizer, length, args.calib_tokens, args.seed).to(model.device)
        say(f"calibration: {rows.numel():,} tokens in {len(rows)} rows of {rows.shape[1]}")
    return quantize_model(model, rows, args, grid)


def quantize_model(model: nn.Module, rows: torch.Tensor, args: Args, grid: GridOptions) -> dict[str, dict[str, Any]]:
    """Quantize the blocks of `model` in place, one after another; returns the report of each layer by name."""
    stream = make_stream(model, rows, keep_full=args.method == "gptq" and args.propagation > 0)
    solver = make_solver(args, grid)
    report = {}
    with Progress("quantizing", "layers", 7 * len(model.model.layers)) as progress:
        for number, block in enumerate(model.model.layers):
            if args.method == "awq":
                scale_block(model, block, stream, partial(awq.search_scale, options=grid))
            elif args.method == "smoothquant":
                scale_block(model, block, stream, partial(smooth.search_scale, alpha=args.alpha))
            for name, layer_report in quantize_block(block, stream, solver, f"model.layers.{number}."):
                report[name] = layer_report
                progress.add()
    return report


def make_solver(args: Args, grid: GridOptions) -> Solve:
    """Return the function that quantizes one layer as --method says."""
    options = GPTQOptions(grid, args.damping, args.act_order, propagation=args.propagation)

    def by_gptq(name: str, layer: nn.Linear, statistics: InputStatistics) -> tuple[QuantizedLinear, dict[str, Any]]:
        solution, report = solve(layer.weight.detach(), statistics, options)
        return GroupedLinear(layer, solution, args.bits), report

    def by_awq(name: str, layer: nn.Linear, statistics: InputStatistics) -> tuple[QuantizedLinear, dict[str, Any]]:
        weight = layer.weight.detach()
        if name.endswith(("q_proj", "k_proj")):  # their errors are multiplied in the scores: clipping them costs more
            solution = solve_nearest(weight, grid)
        else:
            solution = awq.solve_clipped(weight, statistics.sample, grid)
        error = relative_error(weight, solution.dequantize(), statistics.gram)
        return GroupedLinear(layer, solution, args.bits), {"error_after": error}

    def by_smoothing(_: str, layer: nn.Linear, statistics: InputStatistics) -> tuple[QuantizedLinear, dict[str, Any]]:
        quantized, x = W8A8Linear(layer), statistics.sample
        wanted = nn.functional.linear(x, layer.weight)  # (n, out)
        error = (quantized.product(x) - wanted).square().sum() / wanted.square().sum()
        return quantized, {"error_after": float(error)}

    without_text: dict[str, Callable[[nn.Linear], QuantizedLinear]] = {
        "rtn": lambda layer: GroupedLinear(layer, solve_nearest(layer.weight.detach(), grid), args.bits),
        "int8": lambda layer: GroupedLinear(layer, solve_rows(layer.weight.detach().float()), 8),
        "bitnet": lambda layer: PackedBitLinear(layer, layer.kind),
        "llm_int8": partial(LLMInt8Linear, threshold=args.threshold),
        "nf4": partial(FourBitLinear, kind="nf4", double=args.double_quant),
        "fp4": partial(FourBitLinear, kind="fp4", double=args.double_quant),
    }
    by_text = {"gptq": by_gptq, "awq": by_awq, "smoothquant": by_smoothing}
    return by_text.get(args.method) or (lambda _, layer, __: (without_text[args.method](layer), {}))


@torch.no_grad()
def make_stream(model: nn.Module, rows: torch.Tensor, keep_full: bool, batch_tokens: int = 4096) -> Stream:
    """Return the calibration rows (n, T) as hidden states in front of the first block, in batches."""
    batches = rows.split(max(1, batch_tokens // rows.shape[1])) if len(rows) else []
    hidden = [model.embedding(batch) for batch in batches]  # (B, T, dim) each

    def call(block: nn.Module, x: torch.Tensor, number: int) -> torch.Tensor:
        return block(x, *model.context_for_rows(batches[number]), None)

    return Stream(call, hidden, [x.clone() for x in hidden] if keep_full else None)


def scale_block(
    model: nn.Module, block: nn.Module, stream: Stream, search: Callable[..., tuple[torch.Tensor, float | None]]
) -> None:
    """Enlarge the columns of a block's weights that carry the largest activations; search(fold, inputs, run): a scale.

    The scales of all folds are found on the weights as they are, and applied together.
    """
    attention, mlp = block.self_attn, block.mlp
    repeats = model.args.n_heads // model.args.n_kv_heads
    folds = {
        "self_attn.q_proj": awq.Fold(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        "self_attn.o_proj": awq.Fold(attention.v_proj, [attention.o_proj], repeats, model.args.head_dim),
        "mlp.gate_proj": awq.Fold(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        "mlp.down_proj": awq.Fold(mlp.up_proj, [mlp.down_proj]),
    }
    first = partial(stream.call, block, stream.hidden[0], 0)
    scales = {}
    for name, fold in folds.items():
        x = inputs_of(block, name, lambda _: first())
        scales[name], _ = search(fold, x, first)
    for name, fold in folds.items():
        awq.apply_scale(fold, scales[name])


def pad_feed_forward(model: nn.Module, multiple: int) -> None:
    """Widen the feed-forward layers to a multiple of `multiple` with rows and columns of zeros: nothing changes.

    Readers of GPTQ files cut layers whose sides are no multiple of 32, and bitsandbytes' CPU kernel misreads rows that
    are no multiple of 64.
    """
    missing = -model.args.hidden_dim % multiple
    if not missing:
        return
    for block in model.model.layers:
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight = nn.Parameter(nn.functional.pad(layer.weight.detach(), (0, 0, 0, missing)))  # (F, dim)
        down = block.mlp.down_proj
        down.weight = nn.Parameter(nn.functional.pad(down.weight.detach(), (0, missing)))  # (dim, F)
        block.mlp.gate_proj.out_features = block.mlp.up_proj.out_features = down.in_features = down.weight.shape[1]
    before = model.args.hidden_dim
    model.args = model.args.replace(hidden_dim=before + missing)
    say(f"the feed-forward width {before} is padded with zeros to {before + missing}, which the format's readers need")


def check_shapes(model: nn.Module, args: Args) -> None:
    """Raise ValueError for layers that the format cannot keep, before anything is computed."""
    grouped = "group_size" in METHODS[args.method].flags
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


if __name__ == "__main__":
    run(main, arguments, less_memory="a smaller --calib_tokens or --seq_len takes less")

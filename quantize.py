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
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from checkpoint.locate import DEFAULT_MODEL, find_model, find_tokenizer, read_from
from cli.args import parse, run
from cli.flags import Needs, check_flags
from cli.progress import Progress, say
from quant.kinds import FORMATS, KINDS, METHODS, OPTIONS

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
    override: tuple[str, ...] = ()
    """other widths for some layers, as REGEX=BITS; the first that is found in the layer's name counts, for instance
    'down_proj=8' 'layers\\.0\\.=8'"""
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
        for text in self.override:
            self.check_override(text)
        for name in ("calib_tokens", "seq_len", "seed"):
            if getattr(self, name) < (name == "calib_tokens"):
                raise ValueError(
                    f"--{name} should be {1 if name == 'calib_tokens' else 0} or more, found {getattr(self, name)}"
                )

    def check_override(self, text: str) -> None:
        """Raise ValueError for a pair of --override that is none."""
        pattern, _, bits = text.rpartition("=")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"--override {text}: {pattern} is no regular expression ({error})") from None
        if not pattern or bits not in map(str, METHODS[self.method].bits):
            raise ValueError(f"--override should be REGEX=BITS with bits of {METHODS[self.method].bits}, found {text}")
        if self.format == "awq":
            raise ValueError("--override needs a --format that keeps other widths than 4 bits, and awq does not")

    def bits_of(self, name: str) -> int:
        """Return the width of the codes of a layer."""
        pairs = (text.rpartition("=") for text in self.override)
        return next((int(bits) for pattern, _, bits in pairs if re.search(pattern, name)), self.bits)


if __name__ == "__main__":
    arguments = parse(Args, "quantize")  # before torch is loaded: --help and mistakes are answered at once

import copy
import hashlib
import shutil
import time
from dataclasses import replace

import torch
from torch import nn

from checkpoint import quantized
from checkpoint.directory import load_model, save_tokenizer
from checkpoint.quantized_blocks import BegunBlocks
from checkpoint.safetensors_files import weight_files
from checkpoint.transformers_model import TransformersModel
from cli.record import file_sha256, to_plain
from evaluation.text_rows import draw_rows
from files import write_json, written_aside
from hardware import choose_device
from quant.bitnet import PackedBitLinear, kind_of_bits
from quant.calibrate import Stream, quantize_block
from quant.formats import Scheme
from quant.four_bit import BLOCK
from quant.grid import GridOptions
from quant.linear import QuantizedLinear
from quant.methods import make_scaling, make_solver, pad_feed_forward
from quant.replace import base_layers, need_package, refuse_quantized
from tokenizer import Tokenizer
from training.checksums import MOST_BYTES, check_models
from training.signals import caught_signals

REPORT = "quantization_report.json"


def main(args: Args) -> dict[str, Any]:
    """Quantize every linear layer but the head, and write the directory; returns a report per layer."""
    directory = find_model(args.model, "give --model a model directory")
    check_models(read_from(directory), MOST_BYTES)
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
    tokenizer, stop_ids = find_tokenizer(*read_from(directory))
    if tokenizer is None:
        raise FileNotFoundError(f"--model {directory} has no tokenizer to read the calibration text with")
    began = time.monotonic()
    report = quantize_in_place(model, tokenizer, args, directory)
    write(model, tokenizer, stop_ids, args, report)
    shutil.rmtree(begun_folder(args), ignore_errors=True)
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    bits = sum(each["bits"] * each["weights"] for each in report.values()) / sum(r["weights"] for r in report.values())
    print(
        f"{args.out}: {args.method}, {bits:.3g} bits, {size / 1e6:.2f} MB, {time.monotonic() - began:.0f} s",
        *notable(report, args),
        f"every layer: {args.out / REPORT}",
        sep="\n",
        flush=True,
    )
    return {"model": str(args.out), "bytes": size, "layers": report}


def notable(report: dict[str, dict[str, Any]], args: Args) -> list[str]:
    """Return what is worth knowing of the layers' reports, a line each."""
    lines, key = [], "error_after" if any("error_after" in each for each in report.values()) else "weight_error"
    worst = max(report, key=lambda name: report[name][key])
    what = "its output" if key == "error_after" else "its weight"
    lines.append(f"largest error: {worst}, {report[worst][key]:.2%} of {what}")
    if more := [name for name, each in report.items() if each.get("damping", 0) > args.damping]:
        lines.append(f"more damping than asked for: {len(more)} layers, {more[0]} the first")
    if dead := sum(each.get("dead", 0) for each in report.values()):
        lines.append(f"inputs that are always 0 in the calibration text: {dead}")
    return lines


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
    grid = GridOptions(args.bits, args.group_size, args.symmetric, args.search and args.method != "awq", least_zero)
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
    return quantize_model(model, rows, args, grid, begun)


def begun_folder(args: Args) -> Path:
    """Return the folder of blocks that are quantized already."""
    return args.out.with_name(f"{args.out.name}.begun")


@torch.no_grad()
def quantize_model(
    model: nn.Module, rows: torch.Tensor, args: Args, grid: GridOptions, begun: BegunBlocks | None = None
) -> dict[str, dict[str, Any]]:
    """Quantize the blocks of `model` in place, one after another; returns the report of each layer by name.

    On SIGTERM or SIGINT it ends with SystemExit; blocks that are done stay in `begun`.
    """
    stream = make_stream(model, rows, keep_full=args.method == "gptq" and args.propagation > 0)
    solver = make_solver(args, lambda name: replace(grid, bits=args.bits_of(name)))
    scaling, blocks, report, received = make_scaling(args, grid), model.model.layers, {}, []
    kept = [begun is not None and begun.path(number).is_file() for number in range(len(blocks))]
    if any(kept):
        say(f"{begun.folder} has {sum(kept)} of {len(blocks)} blocks already: going on behind them")
    with Progress("quantizing", "layers", 7 * len(blocks), 7 * sum(kept)) as bar, caught_signals(received, world=1):
        for number, block in enumerate(blocks):
            if kept[number]:
                original = copy.deepcopy(block) if stream.full is not None else None
                report |= begun.load(number, block)
                stream.through(block, original)
                continue
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
    return report


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
    hidden = [model.embedding(batch) for batch in batches]  # (B, T, dim) each

    def call(block: nn.Module, x: torch.Tensor, number: int) -> torch.Tensor:
        return block(x, *model.context_for_rows(batches[number]), None)

    return Stream(call, hidden, [x.clone() for x in hidden] if keep_full else None)


def check_shapes(model: nn.Module, args: Args) -> None:
    """Raise ValueError for layers that the format cannot keep, before anything is computed."""
    grouped = "group_size" in METHODS[args.method].flags
    if args.format == "compressed-tensors" and grouped and not args.symmetric:
        say("transformers 5.23 opens compressed-tensors files only with --symmetric True, which loses a little more")
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


if __name__ == "__main__":
    run(main, arguments, less_memory="a smaller --calib_tokens or --seq_len takes less")

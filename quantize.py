"""Quantize the weights of a model to 2, 3, 4 or 8 bits, and write them in a format that other programs read.

python quantize.py --model DIR --calib corpus.txt --out DIR_4bit                      GPTQ, 4 bits, groups of 128
python quantize.py --model DIR --calib data/tiny/sft_train.jsonl --bits 3 --format compressed-tensors --out DIR_3bit
python quantize.py --model DIR --method awq --calib corpus.txt --format awq --out DIR_awq
python quantize.py --model DIR --method rtn --out DIR_rtn                             rounding, without any text
python quantize.py --model DIR --method nf4 --out DIR_nf4                             bitsandbytes' NF4
python quantize.py ladder --model DIR --calib corpus.txt --heldout other.txt          what every method costs and gains

eval.py, fine_tuning.py --lora.method and convert.py merge open the result like any other model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint.locate import find_model, find_tokenizer, is_adapter, read_from
from cli.args import parse_command, run, with_values
from cli.memory import give_back_freed
from cli.progress import say
from quant.kinds import BITNETS, METHODS
from quantizing.args import Args
from quantizing.ladder_args import LadderArgs

COMMANDS = {"": Args, "ladder": LadderArgs}

if __name__ == "__main__":
    # before torch is loaded: --help and mistakes are answered at once
    command, arguments = parse_command(COMMANDS, "quantize", __doc__)

import shutil
import time

import torch

from checkpoint.directory import kept_dtype, load_model
from checkpoint.transformers_model import TransformersModel
from files import check_place
from hardware import choose_device
from quant.qat import grid_of
from quant.replace import refuse_quantized
from quant.trained import kind_of_bits
from quantizing.job import REPORT, begun_folder, quantize_in_place, write
from quantizing.ladder import Ladder
from quantizing.table import draw, header, line, markdown
from training.checksums import MOST_BYTES, check_models


def main(args: Args) -> dict[str, Any]:
    """Quantize every linear layer but the head, and write the directory; returns a report per layer."""
    directory = find_model(args.model, "give --model a model directory")
    check_models(read_from(directory), MOST_BYTES)
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already; choose another directory, or remove it")
    check_place(args.out)
    device = choose_device(args.device)
    give_back_freed()
    dtype = torch.float32 if is_adapter(directory) else kept_dtype(directory)  # float32: what adapters are merged in
    model = load_model(directory, device, dtype).eval()
    if isinstance(model, TransformersModel):
        raise ValueError(f"--model {directory} is not of the LLaMA family, which is all that is quantized here")
    refuse_quantized(model, "quantizing them again would add to the error")
    args = fit_training(args, kind_of_bits(model), directory)
    tokenizer, stop_ids = find_tokenizer(*read_from(directory))
    if tokenizer is None:
        raise FileNotFoundError(f"--model {directory} has no tokenizer to read the calibration text with")
    if args.format == "compressed-tensors" and "group_size" in METHODS[args.method].flags and not args.symmetric:
        say("transformers 5.23 opens compressed-tensors files only with --symmetric True, which loses a little more")
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


def fit_training(args: Args, kind: str | None, directory: Path) -> Args:
    """Return the arguments with the bits of a model that was trained in few bits; kind: None for one that was not.

    Raises ValueError for a method that does not go with the model.
    """
    packs = None if kind is None else "bitnet" if kind in BITNETS else "qat"
    if kind and args.method != packs:
        raise ValueError(f"--model {directory} is trained in few bits ({kind}): --method {packs} packs it")
    if args.method in ("bitnet", "qat") and not kind:
        flag = {"bitnet": "--bitnet", "qat": "--qat_bits"}[args.method]
        raise ValueError(
            f"--method {args.method} packs what pretrain.py {flag} has trained, and --model {directory} was trained in "
            f"full: train it with {flag}, or choose another method"
        )
    if packs != "qat":
        return args
    grid = grid_of(kind)
    if args.format == "awq" and grid.bits != 4:
        raise ValueError(f"--format awq keeps 4 bits, and --model {directory} is trained in {grid.bits}")
    return with_values(args, bits=grid.bits, group_size=grid.group_size)


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


def ladder(args: LadderArgs) -> list[dict[str, Any]]:
    """Measure a model quantized by every method; print the table, write it with a picture, and return its rows."""
    give_back_freed()
    work = Ladder(args)
    print(work.description(), header(), sep="\n", flush=True)
    rows = []
    for row in work.rows():
        rows.append(row)
        print(line(row, rows), flush=True)
    work.write(rows, markdown(work.description(), rows))
    draw(rows, args.out / "ladder.png")
    print(f"{args.out}: ladder.md, ladder.json, ladder.png", flush=True)
    return rows


if __name__ == "__main__":
    advice = "a smaller --calib_tokens or --seq_len takes less"
    run(ladder if command == "ladder" else main, arguments, less_memory=advice)

"""Measure GPTQ and AWQ against gptqmodel: held-out loss, seconds and peak memory, same model and calibration rows.

    python3.11 -m venv .venv-gptqmodel                            # an environment of its own
    .venv-gptqmodel/bin/pip install torch==2.13.0 gptqmodel==7.6.0
    python bench/gptqmodel.py --model DIR --calib corpus.txt --heldout other.txt --python .venv-gptqmodel/bin/python

Each variant quantizes in a process of its own, in turns: 4 bits, zero points where the weights ask for them, the same
rows of ids, as many threads. Seconds are those from the loaded model to the written directory; peak memory is that of
the process, and beside it what it is above the memory with the model loaded. Loss and KL divergence from the model
before are those of the written directories, opened and computed by us in float32: means over the runs, seconds and
memory are medians. Both sides are measured on the same rows, so the difference of their losses has an interval that is
narrower than either's.

gptq: the settings that both have: inputs in the order of activation, ranges searched, damping 0.01, static groups.
gptq default: what each of the two does if nothing else is asked for.
awq: scales and clipped ranges are searched by both; gptqmodel has no other settings, and computes in 16 bits.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

REPOSITORY = Path(__file__).parents[1]
sys.path[0] = str(REPOSITORY)  # in the place of bench/, where this file would hide the package gptqmodel
from checkpoint.directory import load_model, save_model
from checkpoint.locate import find_model, find_tokenizer, read_from
from evaluation.text_rows import draw_rows
from quant.methods import pad_feed_forward
from quantizing.ladder import HELD_OUT_SEED
from quantizing.measure import Comparison, compare, figures, half

METHODS = ("gptq", "gptq default", "awq")
SIDES = ("ours", "gptqmodel")
MEMORY = """
import json, sys, time, torch
def memory(field):
    return int(open('/proc/self/status').read().split(field + ':')[1].split()[0]) * 1024
job = json.load(open(sys.argv[1]))
torch.set_num_threads(job['threads'])
clock = time.monotonic if job['clock'] == 'wall' else time.process_time
def done(loaded, began):
    found = {'seconds': clock() - began, 'peak': memory('VmHWM')}
    print('\\n' + json.dumps(found | {'above': found['peak'] - loaded}))
"""
OURS = """
from pathlib import Path
from checkpoint.directory import load_model
from checkpoint.locate import find_tokenizer
from cli.memory import give_back_freed
from quantizing.args import Args
give_back_freed()
from quantizing.job import quantize_in_place, write
args = Args(Path(job['out']), Path(job['model']), calib=tuple(map(Path, job['calib'])), **job['ours'])
model = load_model(args.model, 'cpu').eval()
tokenizer, stop_ids = find_tokenizer(args.model)
loaded, began = memory('VmRSS'), clock()
report = quantize_in_place(model, tokenizer, args)
write(model, tokenizer, stop_ids, args, report)
done(loaded, began)
"""
THEIRS = """
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
model = GPTQModel.load(job['model'], QuantizeConfig(**job['theirs']), device='cpu', dtype=getattr(torch, job['dtype']))
loaded, began = memory('VmRSS'), clock()
rows = [{'input_ids': row} for row in job['rows']]
model.quantize(rows, batch_size=job['batch'], calibration_sort='', backend=BACKEND[job['backend']])
model.save(job['out'])
done(loaded, began)
"""


@dataclass(frozen=True)
class Args:
    """Compare quantization with gptqmodel."""

    model: Path
    """model directory; gptqmodel needs sides that are multiples of 64"""
    calib: tuple[Path, ...]
    """text to calibrate on"""
    heldout: tuple[Path, ...]
    """text to measure the loss on"""
    python: Path
    """Python of an environment that has gptqmodel"""
    pad: int = 0
    """first widen the feed-forward layers to a multiple of this with zeros, which changes nothing; 0: do not"""
    methods: tuple[str, ...] = METHODS
    """gptq, gptq default, awq (4 bits alone)"""
    bits: int = 4
    """width of the codes"""
    group_size: int = 128
    """weights that share a scale"""
    calib_tokens: int = 25_000
    """tokens to calibrate on"""
    heldout_tokens: int = 25_000
    """tokens to measure on"""
    seq_len: int = 256
    """tokens in a row"""
    awq_dtype: Literal["float16", "bfloat16"] = "float16"
    """dtype in which gptqmodel computes AWQ, which it does not in float32"""
    repeats: int = 3
    """runs of each variant; each run has a draw of calibration rows of its own"""
    threads: int = torch.get_num_threads()
    """threads of each side"""
    clock: Literal["wall", "processor"] = "wall"
    """processor: seconds of all threads in place of those of the clock, for a machine that is busy"""
    out: Path | None = None
    """also write the rows as JSON"""


def settings(args: Args, method: str) -> dict[str, Any]:
    """Return the settings of both sides, and what gptqmodel computes with."""
    ours: dict[str, Any] = {"group_size": args.group_size, "bits": args.bits, "seq_len": args.seq_len, "device": "cpu"}
    ours |= {"calib_tokens": args.calib_tokens}
    theirs: dict[str, Any] = {"bits": args.bits, "group_size": args.group_size, "sym": False, "offload_to_disk": False}
    if method == "awq":
        ours |= {"method": "awq", "format": "awq"}
        theirs |= {"quant_method": "awq", "format": "gemm"}
        return {"ours": ours, "theirs": theirs, "backend": "AWQ_TORCH", "dtype": args.awq_dtype}
    ours |= {"format": "gptq_v2"}
    theirs |= {"format": "gptq_v2"}
    if method == "gptq":
        ours |= {"propagation": 0.0, "damping": 0.01}
        theirs |= {"damp_percent": 0.01, "desc_act": True, "static_groups": True, "mse": 2.4}
    return {"ours": ours, "theirs": theirs, "backend": "GPTQ_TORCH", "dtype": "float32"}


def run(job: dict[str, Any], side: str, python: Path, folder: Path) -> dict[str, Any]:
    """Quantize in a process of its own, and return its seconds and its memory."""
    (folder / "job.json").write_text(json.dumps(job))
    code = MEMORY + (OURS if side == "ours" else THEIRS)
    workers = {"GPTQMODEL_CPU_WORKERS": str(max(2, job["threads"])), "OMP_NUM_THREADS": str(job["threads"])}
    done = subprocess.run(
        [str(python), "-c", code, str(folder / "job.json")],
        cwd=REPOSITORY if side == "ours" else folder,
        env=os.environ | workers,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(
    args: Args, method: str, directory: Path, full: torch.nn.Module, heldout: torch.Tensor, folder: Path
) -> dict[str, Any]:
    """Return the row of a method: both sides on the model in `directory`."""
    tokenizer, _ = find_tokenizer(*read_from(directory))
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(args.repeats):
        both = settings(args, method)
        both["ours"]["seed"] = number
        rows = draw_rows(args.calib, tokenizer, args.seq_len, args.calib_tokens, number).tolist()
        for side, python in zip(SIDES, (Path(sys.executable), args.python.absolute()), strict=True):
            job = both | {"out": str(folder / f"{side}_{number}"), "model": str(directory.absolute()), "rows": rows}
            job |= {"threads": args.threads, "clock": args.clock}
            job |= {"calib": [str(path.absolute()) for path in args.calib], "batch": max(1, 4096 // args.seq_len)}
            found[side].append(run(job, side, python, folder))
    row: dict[str, Any] = {"method": method, "bits": args.bits, "runs": found}
    for key in ("seconds", "peak", "above"):
        row[key] = {side: statistics.median(one[key] for one in runs) for side, runs in found.items()}
        row[f"{key}_ratio"] = statistics.median(
            a[key] / b[key] for a, b in zip(found["ours"], found["gptqmodel"], strict=True)
        )
    return row | quality(args, full, heldout, folder)


def quality(args: Args, full: torch.nn.Module, heldout: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Return how far the written models of both sides are from the full one, and from each other, on the same rows."""
    names = [f"{side}_{number}" for side in SIDES for number in range(args.repeats)]
    models = [load_model(folder / name, "cpu", torch.float32).eval() for name in names]
    compared = compare(full, models, heldout)
    row: dict[str, Any] = {"more": {}, "more_half": {}, "more_of_draws": {}, "kl": {}, "kl_of_draws": {}}
    for number, side in enumerate(SIDES):
        own = slice(number * args.repeats, (number + 1) * args.repeats)
        part = figures(Comparison(compared.losses[own], compared.base, compared.kl[own], compared.top1[own]), 1.0)
        row["more"][side], row["more_half"][side] = part["more_nats"], part["more_nats_half"]
        row["more_of_draws"][side], row["kl_of_draws"][side] = part["more_nats_of_draws"], compared.kl[own]
        row["kl"][side] = part["kl"]
    ours, theirs = compared.losses.double().split(args.repeats)  # (repeats, n) each
    difference = (ours - theirs).mean(0)  # (n,): of each row, the mean over the draws
    row |= {"difference": float(difference.mean()), "difference_half": half(difference)}
    return row | {f"{key}_ratio": row[key]["ours"] / row[key]["gptqmodel"] for key in ("more", "kl")}


def main(args: Args) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        return measure_methods(args, find_model(args.model), Path(folder) / "padded")


def measure_methods(args: Args, directory: Path, padded: Path) -> list[dict[str, Any]]:
    """Measure the model in a directory, which is written anew to `padded` where its layers are widened."""
    full = load_model(directory, "cpu").float().eval()
    tokenizer, stop_ids = find_tokenizer(*read_from(directory))
    if args.pad and pad_feed_forward(full, args.pad):
        save_model(padded, full, tokenizer, stop_ids)
        directory = padded
    heldout = draw_rows(args.heldout, tokenizer, args.seq_len, args.heldout_tokens, HELD_OUT_SEED)
    counts = f"{full.n_parameters():,} parameters, {args.calib_tokens:,} calibration tokens"
    print(f"{counts}, {args.threads} threads, {args.clock} time")
    print(f"{'method':14}{'side':11}{'more nats':>18}{'KL':>9}{'seconds':>9}{'peak MB':>9}{'above the model MB':>20}")
    table = []
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            table.append(row := measure(args, method, directory, full, heldout, Path(folder)))
        for side in SIDES:
            print(
                f"{method:14}{side:11}{row['more'][side]:10.4f} ±{row['more_half'][side]:.4f}{row['kl'][side]:9.5f}"
                f"{row['seconds'][side]:9.1f}{row['peak'][side] / 1e6:9.0f}{row['above'][side] / 1e6:20.0f}"
            )
        ratios = [row[f"{key}_ratio"] for key in ("more", "kl", "seconds", "peak", "above")]
        widths = zip(ratios, (18, 9, 9, 9, 20), strict=True)
        print(f"{'':14}{'ratio':11}" + "".join(f"{ratio:{width}.2f}" for ratio, width in widths))
        print(f"{'':14}{'ours - gptqmodel':16}{row['difference']:+13.4f} ±{row['difference_half']:.4f}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(table, indent=2))
    return table


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

"""Quantize one model with our GPTQ and AWQ and with gptqmodel's: loss, seconds, processor time and peak memory.

    python3.11 -m venv .venv-gptqmodel && .venv-gptqmodel/bin/pip install torch==2.13.0 gptqmodel==7.6.0 optimum==2.3.0
    python bench/quantization.py --model DIR --calib corpus.txt --heldout other.txt

The same rows of calibration text, 4 bits, the same groups, zero points, damping and order of the inputs on both sides;
"ours" has besides what ours has by default (range search, error propagation). Each runs in a process of its own, one
after another, as often as `--draws` says, with other calibration rows each time. Both directories are read by this
program and measured on the same held-out rows. seconds and processor time are of quantizing alone; peak memory is that
of the process above what it had when the model was loaded.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import quantize
from checkpoint.directory import load_model
from checkpoint.locate import find_model, find_tokenizer
from evaluation.text_rows import draw_rows
from quantizing.job import quantize_in_place, write
from quantizing.measure import compare, figures

SIDES = {  # name -> settings of quantize.py; None: gptqmodel's
    "gptqmodel gptq": None,
    "ours gptq, same": {"method": "gptq", "search": False, "propagation": 0.0, "format": "gptq_v2"},
    "ours gptq": {"method": "gptq", "format": "gptq_v2"},
    "gptqmodel awq": None,
    "ours awq": {"method": "awq", "format": "awq"},
    "rounding": {"method": "rtn", "search": False, "format": "gptq_v2"},
}
WORKER = Path(__file__).with_name("gptqmodel_worker.py")


@dataclass(frozen=True)
class Args:
    """Compare our GPTQ and AWQ with gptqmodel's."""

    model: Path
    """directory of the model, or of a run"""
    calib: tuple[Path, ...] = ()
    """calibration text"""
    heldout: tuple[Path, ...] = ()
    """text to measure on"""
    group_size: int = 128
    """weights of a row that share a scale"""
    calib_tokens: int = 25_000
    """tokens to calibrate on"""
    heldout_tokens: int = 25_000
    """tokens to measure on"""
    draws: int = 3
    """draws of calibration rows"""
    sides: tuple[str, ...] = tuple(SIDES)
    """rows of the table"""
    gptqmodel_python: Path = Path(".venv-gptqmodel/bin/python")
    """Python of the environment that has gptqmodel"""
    threads: int = field(default_factory=torch.get_num_threads)
    """processor cores"""
    out: Path | None = None
    """also write the rows as JSON"""
    worker: str = ""
    """of the processes that this program starts: a JSON object"""


def work(request: dict[str, Any]) -> None:
    """Quantize with ours, and print what it took."""
    directory = Path(request["model"])
    tokenizer, stop_ids = find_tokenizer(directory)
    model = load_model(directory).eval()
    settings = request["settings"] | {"calib": tuple(map(Path, request["settings"].get("calib", ())))}
    one = quantize.Args(Path(request["out"]), directory, device="cpu", **settings)
    before, began, used = peak(), time.perf_counter(), time.process_time()
    report = quantize_in_place(model, tokenizer, one)
    took = {"seconds": time.perf_counter() - began, "processor": time.process_time() - used, "memory": peak() - before}
    write(model, tokenizer, stop_ids, one, report)
    print(json.dumps(took))


def peak() -> int:
    """Return the largest memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(side: str, seed: int, directory: Path, args: Args, folder: Path) -> tuple[Path, dict[str, float]]:
    """Quantize in a process of its own; return the directory and what it took."""
    out, settings = folder / f"{side}-{seed}", SIDES[side]
    texts = {"calib": [str(path.absolute()) for path in args.calib], "calib_tokens": args.calib_tokens, "seed": seed}
    request: dict[str, Any] = {"model": str(directory.absolute()), "out": str(out), "threads": args.threads}
    if settings is None:
        tokenizer, _ = find_tokenizer(directory)
        length = min(512, load_model(directory).args.max_seq_len)
        rows = draw_rows(args.calib, tokenizer, length, args.calib_tokens, seed)
        request |= {"rows": rows.tolist(), "group_size": args.group_size, "method": side.split()[1]}
        command = [str(args.gptqmodel_python.absolute()), str(WORKER)]
    else:
        request["settings"] = settings | {"group_size": args.group_size} | ({} if side == "rounding" else texts)
        command = [sys.executable, __file__, "--model", ".", "--worker", "-"]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} has failed:\n{done.stderr[-2000:]}")
    return out, json.loads(done.stdout.strip().splitlines()[-1])


def main(args: Args) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows."""
    torch.set_num_threads(args.threads)
    directory = find_model(args.model)
    tokenizer, _ = find_tokenizer(directory)
    full = load_model(directory).eval()
    rows = draw_rows(args.heldout, tokenizer, min(512, full.args.max_seq_len), args.heldout_tokens, seed=1234)
    print(
        f"{directory}: {full.n_parameters():,} parameters, 4 bits, groups of {args.group_size}, {args.calib_tokens:,} "
        f"calibration tokens, {args.draws} draws, {rows.numel():,} held-out tokens, {args.threads} threads"
    )
    print(f"{'':18}{'more nats':>20}{'draws':>20}{'KL':>10}{'seconds':>10}{'processor s':>13}{'peak MB':>9}")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for side in args.sides:
            draws = [run(side, seed, directory, args, Path(folder)) for seed in range(args.draws)]
            models = [load_model(out).eval() for out, _ in draws]
            row: dict[str, Any] = {"side": side} | figures(compare(full, models, rows), 1.0)
            for name in ("seconds", "processor", "memory"):
                row[name] = statistics.median(took[name] for _, took in draws)
            table.append(row)
            each = row["more_nats_of_draws"]
            more = f"{row['more_nats']:+.4f} ±{row['more_nats_half']:.4f}"
            print(
                f"{side:18}{more:>20}{f'{min(each):.4f} to {max(each):.4f}':>20}{row['kl']:10.5f}{row['seconds']:10.1f}"
                f"{row['processor']:13.1f}{row['memory'] / 1e6:9.1f}",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(table, indent=2))
    return table


if __name__ == "__main__":
    parsed = tyro.cli(Args, use_underscores=True)
    if parsed.worker:
        work(json.load(sys.stdin))
    else:
        main(parsed)

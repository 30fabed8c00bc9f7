"""Measure the memory of quantize.py on models of one width and several depths: does it grow with the depth?

    python bench/quantize_memory.py --tokenizer data/tiny/tokenizer --calib data/tiny/train_00000.bin
    python bench/quantize_memory.py --tokenizer DIR --calib FILE --layers 4 16 --dtype bfloat16 --method awq

Each model has random weights and is quantized by a process of its own, whose memory is read a hundred times a second:
"anon" is what it allocated, "file" the pages of mapped files, which the system takes back whenever others need them. A
process that only loads the programs and the model, and quantizes nothing, is measured first; its memory is left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from checkpoint.directory import save_model
from model import Transformer
from model_args import ModelArgs
from tokenizer import load_tokenizer

FIELDS = {"anon": "RssAnon", "file": "RssFile", "both": "VmRSS"}
START = "import quantize, sys; sys.exit()"
MEGABYTE = 1e6


@dataclass(frozen=True)
class Args:
    """Measure the memory of quantize.py."""

    tokenizer: Path
    """directory of a tokenizer for the models"""
    calib: Path
    """text to calibrate on"""
    layers: tuple[int, ...] = (4, 8, 16)
    """depths of the models"""
    dim: int = 512
    """width of the models; the feed-forward layers are of 2.75 times as much"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the files"""
    method: Literal["gptq", "awq", "rtn"] = "gptq"
    """method of quantize.py"""
    calib_tokens: int = 8192
    """tokens to calibrate on"""
    seq_len: int = 256
    """tokens in a row"""
    out: Path | None = None
    """also write the rows as JSON"""


def peaks(command: list[str]) -> dict[str, float]:
    """Run a command to its end; return its peaks of allocated memory, of mapped files and of both, in MB."""
    found = dict.fromkeys(FIELDS, 0.0)
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        for name, field in FIELDS.items():
            if field in lines:  # a process that has ended has none
                found[name] = max(found[name], int(lines[field].split()[0]) * 1024 / MEGABYTE)
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stdout.read()[-2000:]}")
    return found


def measure(args: Args, n_layers: int, before: dict[str, float]) -> dict[str, float]:
    """Return the sizes of a model and the peaks of quantizing it, less those of a process that does nothing, in MB."""
    tokenizer, dtype = load_tokenizer(args.tokenizer), getattr(torch, args.dtype)
    torch.manual_seed(0)
    hidden = args.dim * 11 // 4 // 64 * 64
    shape = ModelArgs(args.dim, n_layers, args.dim // 64, vocab_size=tokenizer.vocab_size, hidden_dim=hidden)
    model = Transformer(shape).to(dtype)
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4 / MEGABYTE
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", model, tokenizer)
        size = (Path(folder) / "model/model.safetensors").stat().st_size / MEGABYTE
        del model
        command = [sys.executable, "quantize.py", "--model", f"{folder}/model", "--out", f"{folder}/out"]
        command += ["--method", args.method]
        if args.method != "rtn":
            command += ["--calib", str(args.calib.resolve()), "--calib_tokens", str(args.calib_tokens)]
            command += ["--seq_len", str(args.seq_len)]
        peak = peaks(command)
        written = sum(path.stat().st_size for path in Path(folder).glob("out/*.safetensors")) / MEGABYTE
    states = 0.0 if args.method == "rtn" else args.calib_tokens * args.dim * 4 / MEGABYTE
    row = {"layers": n_layers, "model": size, "block": block, "states": states, "written": written}
    return row | {name: peak[name] - before[name] for name in FIELDS}


def main(args: Args) -> list[dict[str, float]]:
    """Measure every depth, print a table, and return its rows."""
    before = peaks([sys.executable, "-c", START])
    print(f"{args.method}, files in {args.dtype}; a process without a model: {before['both']:.0f} MB; all in MB")
    print(f"{'layers':>6}{'model':>8}{'block, fp32':>13}{'states':>8}{'written':>9}{'anon':>8}{'file':>8}{'both':>8}")
    rows = []
    for n_layers in args.layers:
        rows.append(row := measure(args, n_layers, before))
        sizes = f"{row['layers']:6}{row['model']:8.1f}{row['block']:13.1f}{row['states']:8.1f}{row['written']:9.1f}"
        print(f"{sizes}{row['anon']:8.1f}{row['file']:8.1f}{row['both']:8.1f}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

"""Measure tokens a second of greedy decoding against llama.cpp, with the same weights at the same widths.

    python3 -m venv .venv-llama && .venv-llama/bin/pip install llama-cpp-python
    python bench/llama_cpp.py --tokenizer data/tiny/tokenizer                  # 15, 27 and 60 million random parameters
    python bench/llama_cpp.py --model DIR --text held_out.txt                  # a model of yours, with the loss beside

Ours in float32, bfloat16, and rounded to 8 and 4 bits in groups of 32, against F32, BF16, Q8_0 and Q4_0, whose blocks
are of 32, too; the files are those of `convert.py export --format gguf`. Both sides decode greedily, one row, one token
after another, and take turns in short answers, so that a change of the machine's speed affects both; the ratio is the
median of the ratios within a round. With four bits both keep embedding and head in eight.

"of fp32" is the speed as a multiple of our float32 in the same rounds. "of read rate" is the rate at which a step reads
the weights, as a share of the rate at which this machine reads memory; above 1 the weights stay in the cache.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.decode import PROMPT, read_rate
from checkpoint.directory import load_model, save_model
from checkpoint.locate import find_model
from decoding.feeder import Feeder
from evaluation.text_rows import draw_rows
from model import Transformer
from model_args import ModelArgs
from quant.gptq import solve_nearest
from quant.grid import GridOptions
from quant.grouped import GroupedLinear
from quant.replace import base_layers, replace
from quantizing.measure import logits_of
from tokenizer import load_tokenizer

SHAPES = {
    "15M": ModelArgs(dim=288, n_layers=6, n_heads=6, vocab_size=32000),
    "27M": ModelArgs(dim=512, n_layers=8, n_heads=8, vocab_size=4800, hidden_dim=1376),
    "60M": ModelArgs(dim=512, n_layers=14, n_heads=8, vocab_size=32000, hidden_dim=1376),
}
WIDTHS = {"fp32": ("fp32", "F32"), "bf16": ("bf16", "BF16"), "int8": ("q8_0", "Q8_0"), "int4": ("q4_0", "Q4_0")}
WORKER = Path(__file__).with_name("llama_cpp_worker.py")


@dataclass(frozen=True)
class Args:
    """Compare the speed of decoding with llama.cpp."""

    sizes: tuple[str, ...] = tuple(SHAPES)
    """models of random weights"""
    model: Path | None = None
    """a model directory in place of them"""
    text: Path | None = None
    """held-out text: the loss of both sides on 512 tokens of it, with --model"""
    tokenizer: Path = Path("data/tiny/tokenizer")
    """directory of a tokenizer for the files of random models"""
    llama_python: Path = Path(".venv-llama/bin/python")
    """Python of the environment that has llama-cpp-python"""
    tokens: int = 48
    """tokens in an answer"""
    repeats: int = 7
    """measured answers of each variant, after one warm-up"""
    threads: int = field(default_factory=torch.get_num_threads)
    """processor cores of each side"""
    out: Path | None = None
    """also write the rows as JSON"""


class Worker:
    """llama.cpp in a process of its own, which sleeps while it has nothing to do."""

    def __init__(self, python: Path, threads: int) -> None:
        self.threads, pipe = threads, subprocess.PIPE
        command = [str(python.absolute()), str(WORKER)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{WORKER.name} has ended; run it by hand with {json.dumps(request)[:200]}")
        return json.loads(line)


def rounded(directory: Path, bits: int) -> Transformer:
    """Return the model of a directory with every linear layer but the head rounded, in groups of 32."""
    model = load_model(directory).eval()
    for path, layer in base_layers(model):
        grid = solve_nearest(layer.weight.detach(), GridOptions(bits, 32, search=False))
        replace(model, path, GroupedLinear(layer, grid, bits))
    return model


@torch.inference_mode()
def ours(model: Transformer, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Decode greedily with our model."""
    feed = Feeder(model, model.make_cache(1, PROMPT + tokens))
    moments, ids, run, past = [time.perf_counter()], [], prompt, 0
    while len(ids) < tokens:
        ids.append(int(feed([run], [past])[0, -1].argmax()))
        run, past = ids[-1:], past + len(run)
        moments.append(time.perf_counter())
    return {"moments": moments, "ids": ids}


def weight_bytes(model: Transformer, width: str) -> float:
    """Return the bytes that a step reads: linear layers and the head; groups of 32 have a scale and a zero point."""
    linear = sum(layer.in_features * layer.out_features for _, layer in base_layers(model))
    head = model.args.vocab_size * model.args.dim
    if width in ("fp32", "bf16"):
        return (linear + head) * (4 if width == "fp32" else 2)
    return linear * (1 if width == "int8" else 0.5) + linear / 32 * 5 + head * (1 + 5 / 64)


def measure(name: str, directory: Path, args: Args, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    full = load_model(directory).eval()
    prompt = torch.randint(0, full.args.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    models = {"fp32": full, "bf16": load_model(directory, dtype=torch.bfloat16).eval()}
    models |= {"int8": rounded(directory, 8), "int4": rounded(directory, 4)}
    worker, files = Worker(args.llama_python, args.threads), {}
    for width, (dtype, theirs) in WIDTHS.items():
        files[width] = str(folder / f"{name}.{theirs}.gguf")
        export = ["convert.py", "export", "--model", str(directory.absolute()), "--format", "gguf", "--dtype", dtype]
        command = [sys.executable, *export, "--out", files[width]]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
        system = worker.ask(load=files[width], threads=args.threads)["system"]
    print(f"llama.cpp: {system}")
    runs = {("ours", width): lambda m=model: ours(m, prompt, args.tokens) for width, model in models.items()}
    runs |= {
        ("llama.cpp", w): lambda f=f: worker.ask(decode=f, prompt=prompt, tokens=args.tokens) for w, f in files.items()
    }
    seconds: dict[tuple[str, str], list[float]] = {variant: [] for variant in runs}
    memory, rates = torch.ones(2**26), []
    for number in range(args.repeats + 1):
        for width in WIDTHS:  # the two sides in turns
            for side in ("ours", "llama.cpp"):
                moments = runs[side, width]()["moments"]
                if number:
                    seconds[side, width].append(statistics.median(b - a for a, b in pairwise(moments[1:])))
        rates.append(read_rate(memory))
    losses = {}
    if args.text:
        ids = draw_rows((args.text,), load_tokenizer(directory), min(512, full.args.max_seq_len), 512, seed=0)[0]
        for width in WIDTHS:
            found = torch.nn.functional.cross_entropy(logits_of(models[width], ids)[:-1], ids[1:])
            losses["ours", width] = float(found)
            losses["llama.cpp", width] = worker.ask(loss=files[width], ids=ids.tolist())["loss"]
    worker.process.kill()
    return [row_of(name, variant, seconds, losses, weight_bytes(full, variant[1]) / max(rates)) for variant in runs]


def row_of(name: str, variant: tuple[str, str], seconds: dict, losses: dict, least: float) -> dict[str, Any]:
    """Return a row; least: seconds in which this machine reads the weights once."""
    side, width = variant
    mine = seconds[variant]
    return {
        "model": name,
        "side": side,
        "width": width,
        "tokens_per_second": 1 / statistics.median(mine),
        "of_llama_cpp": statistics.median(b / a for a, b in zip(mine, seconds["llama.cpp", width])),
        "of_fp32": statistics.median(b / a for a, b in zip(mine, seconds["ours", "fp32"])),
        "of_read_rate": least / statistics.median(mine),
        "loss": losses.get(variant),
    }


def main(args: Args) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows."""
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, {args.repeats} interleaved answers of {args.tokens} tokens, one row")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        directories = {args.model.name: find_model(args.model)} if args.model else {}
        for name in () if args.model else args.sizes:
            directories[name] = Path(folder) / name
            torch.manual_seed(0)
            directories[name].mkdir()
            model = Transformer(SHAPES[name].replace(max_seq_len=1024))
            save_model(directories[name], model, load_tokenizer(args.tokenizer), None)
        for name, directory in directories.items():
            rows = measure(name, directory, args, Path(folder))
            table += rows
            print(
                f"{'model':8}{'width':6}{'side':11}{'tok/s':>8}{'x llama.cpp':>13}{'x our fp32':>12}"
                f"{'of read rate':>14}{'loss':>9}"
            )
            for row in rows:
                print(
                    f"{name:8}{row['width']:6}{row['side']:11}{row['tokens_per_second']:8.0f}{row['of_llama_cpp']:13.2f}"
                    f"{row['of_fp32']:12.2f}{row['of_read_rate']:14.0%}{row['loss'] or float('nan'):9.4f}",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(table, indent=2))
    return table


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

"""Measure tokens a second of greedy decoding against llama.cpp, with the same weights at the same widths.

    pip install xllamacpp                            # llama.cpp, compiled, with its server
    python bench/llama_cpp.py --tokenizer data/tiny/tokenizer                  # 15, 27 and 60 million random parameters
    python bench/llama_cpp.py --model DIR --text held_out.txt                  # a model of yours, with the loss beside

Ours in float32, bfloat16, and rounded to 8 and 4 bits in groups of 32, against F32, BF16, Q8_0 and Q4_0, whose blocks
are of 32, too; the files are those of `convert.py export --format gguf`. Both sides decode greedily, one row, one token
after another, and take turns in short answers, so that a change of the machine's speed affects both; the ratio is the
median of the ratios within a round, and "best" the ratio of the fastest answers of both sides, which other programs on
the machine disturb less. With four bits both keep embedding and head in eight.

The seconds of llama.cpp are those that its server states for decoding; ours are those between two tokens. The loss is
that of the numbers in the files, computed here, which leaves out how llama.cpp rounds the inputs of its products.

"of fp32" is the speed as a multiple of our float32 in the same rounds. "of read rate" is the rate at which a step reads
the weights, as a share of the rate at which this machine reads memory; above 1 the weights stay in the cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
import xllamacpp
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))
import convert
from bench.decode import PROMPT, read_rate
from checkpoint.directory import load_model, save_model
from checkpoint.locate import find_model
from decoding.feeder import Feeder
from decoding.pages import in_huge_pages
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
    tokens: int = 48
    """tokens in an answer"""
    repeats: int = 7
    """measured answers of each variant, after one warm-up"""
    threads: int = field(default_factory=torch.get_num_threads)
    """processor cores of each side"""
    clock: Literal["wall", "processor"] = "wall"
    """processor: seconds of this process in place of those of the clock, for a machine that is busy; with one thread"""
    out: Path | None = None
    """also write the rows as JSON"""


class LlamaCpp:
    """A GGUF file that llama.cpp has opened, with its server in this process."""

    def __init__(self, path: str, threads: int) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def seconds(self, prompt: list[int], tokens: int) -> float:
        """Return the seconds of a token when it decodes greedily, as the server states them."""
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        data, kind = json.dumps(body | {"samplers": ["temperature"]}).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}/completion", data, kind)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())["timings"]["predicted_per_token_ms"] / 1e3


def used(decode: Callable[[list[int], int], Any], prompt: list[int], tokens: int) -> float:
    """Return the seconds of this process for a token: what an answer takes more than one of two tokens."""
    spent = []
    for n in (2, tokens):
        before = time.process_time()
        decode(prompt, n)
        spent.append(time.process_time() - before)
    return (spent[1] - spent[0]) / (tokens - 2)


def rounded(directory: Path, bits: int) -> Transformer:
    """Return the model of a directory with every linear layer but the head rounded, in groups of 32."""
    model = load_model(directory).eval()
    for path, layer in base_layers(model):
        grid = solve_nearest(layer.weight.detach(), GridOptions(bits, 32, search=False))
        replace(model, path, GroupedLinear(layer, grid, bits))
    return model


@torch.inference_mode()
def ours(model: Transformer, prompt: list[int], tokens: int) -> float:
    """Return the seconds of a token when our model decodes greedily."""
    feed = Feeder(model, model.make_cache(1, PROMPT + tokens))
    run, past, moments = prompt, 0, []
    for _ in range(tokens):
        last = int(feed([run], [past])[0, -1].argmax())
        run, past = [last], past + len(run)
        moments.append(time.perf_counter())
    return (moments[-1] - moments[0]) / (tokens - 1)


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
    for model in models.values():
        in_huge_pages(model)  # as eval.py and serve.py do
    files, runs = {}, {("ours", width): partial(ours, model) for width, model in models.items()}
    for width, (dtype, theirs) in WIDTHS.items():
        files[width] = folder / f"{name}.{theirs}.gguf"
        convert.export(convert.Export(model=directory, format="gguf", dtype=dtype, out=files[width]))
        runs["llama.cpp", width] = LlamaCpp(str(files[width]), args.threads).seconds
    seconds: dict[tuple[str, str], list[float]] = {variant: [] for variant in runs}
    memory, rates = torch.ones(2**26), []
    for number in range(args.repeats + 1):
        for variant in [(side, width) for width in WIDTHS for side in ("ours", "llama.cpp")]:  # in turns
            decode = runs[variant]
            found = decode(prompt, args.tokens) if args.clock == "wall" else used(decode, prompt, args.tokens)
            if number:  # the first one warms up
                seconds[variant].append(found)
        rates.append(read_rate(memory))
    losses = losses_of(directory, models, files, args.text) if args.text else {}
    return [row_of(name, variant, seconds, losses, weight_bytes(full, variant[1]) / max(rates)) for variant in runs]


def losses_of(
    directory: Path, models: dict[str, Transformer], files: dict[str, Path], text: Path
) -> dict[tuple[str, str], float]:
    """Return the mean loss of ours and of the numbers in the GGUF files on 5,000 tokens of a text."""
    rows, losses = draw_rows((text,), load_tokenizer(directory), 512, 5_000, seed=0), {}
    for width, path in files.items():
        target = path.with_suffix("")
        convert.import_(convert.Import(source=path, out=target))
        for side, model in (("ours", models[width]), ("llama.cpp", load_model(target).eval())):
            each = [float(cross_entropy(logits_of(model, ids)[:-1], ids[1:])) for ids in rows]
            losses[side, width] = statistics.mean(each)
    return losses


def row_of(name: str, variant: tuple[str, str], seconds: dict, losses: dict, least: float) -> dict[str, Any]:
    """Return a row; least: seconds in which this machine reads the weights once."""
    side, width = variant
    mine = seconds[variant]
    return {
        "model": name,
        "side": side,
        "width": width,
        "tokens_per_second": 1 / min(mine),
        "of_llama_cpp": statistics.median(b / a for a, b in zip(mine, seconds["llama.cpp", width])),
        "best_of_llama_cpp": min(seconds["llama.cpp", width]) / min(mine),
        "best_of_fp32": min(seconds["ours", "fp32"]) / min(mine),
        "of_fp32": statistics.median(b / a for a, b in zip(mine, seconds["ours", "fp32"])),
        "of_read_rate": least / min(mine),
        "loss": losses.get(variant),
    }


def main(args: Args) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows."""
    torch.set_num_threads(args.threads)
    if args.clock == "processor" and args.threads > 1:
        raise SystemExit("error: --clock processor needs --threads 1: threads that wait count, too")
    print(f"llama.cpp {xllamacpp.__version__}: {xllamacpp.get_system_info()}")
    print(f"{args.threads} threads, {args.repeats} interleaved answers of {args.tokens} tokens, {args.clock} time")
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
                f"{'model':8}{'width':6}{'side':11}{'tok/s':>8}{'x llama.cpp':>13}{'best':>7}{'x our fp32':>12}"
                f"{'best':>7}{'of read rate':>14}{'loss':>9}"
            )
            for row in rows:
                loss = float("nan") if row["loss"] is None else row["loss"]
                print(
                    f"{name:8}{row['width']:6}{row['side']:11}{row['tokens_per_second']:8.0f}{row['of_llama_cpp']:13.2f}"
                    f"{row['best_of_llama_cpp']:7.2f}{row['of_fp32']:12.2f}{row['best_of_fp32']:7.2f}"
                    f"{row['of_read_rate']:14.0%}{loss:9.4f}",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(table, indent=2))
    return table


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

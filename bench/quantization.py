"""Quantize a model in many ways, and print what each costs and gains: the ladder of docs/quantization.md.

    python bench/quantization.py --model out/tiny/sft/best --calib data/tiny/sft_train.jsonl \\
        --heldout data/tiny/sft_heldout.jsonl --group_size 32

"more nats" is the loss on held-out rows less that of the model in float32 on the same rows, with the 95 % interval of
the mean of the rows' differences. "of rounding" is that difference as a share of what plain rounding (rtn-) to as many
bits loses. KL is that of the float32 model's predictions to the row's, in nats a token. All is computed as decoding
computes it, by the compiled step where it applies.
Methods that draw calibration rows are run for every draw; the table has the
mean, and "of rounding" the range.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn.functional import cross_entropy, log_softmax

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.extras import need

need("bench/quantization.py", "bench", "bitsandbytes")

import quantize
from checkpoint.directory import load_model, save_model
from checkpoint.locate import find_model, find_tokenizer
from cli.progress import say
from decoding.feeder import Feeder
from evaluation.text_rows import draw_rows
from model import Transformer
from quant.replace import quantize_base

METHODS: dict[str, dict[str, Any]] = {  # name of a row, without its bits -> settings of quantize.py
    "rtn-": {"method": "rtn", "search": False},
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq-": {"method": "gptq", "search": False, "propagation": 0.0},
    "gptq no qep": {"method": "gptq", "propagation": 0.0},
    "gptq": {"method": "gptq"},
}
FORMAT = "compressed-tensors"  # the one that keeps every width and shape


@dataclass(frozen=True)
class Args:
    """Print the ladder of a model."""

    model: Path
    """directory of the model, or of a run"""
    calib: tuple[Path, ...]
    """calibration text: token bins, text files or conversations"""
    heldout: tuple[Path, ...]
    """text to measure on, likewise; it should not be part of --calib"""
    group_size: int = 128
    """weights of a row that share a scale; -1: the whole row"""
    calib_tokens: int = 25_000
    """tokens to calibrate on"""
    heldout_tokens: int = 25_000
    """tokens to measure on"""
    seq_len: int = 0
    """tokens in a row; 0: the model's context, 512 at most"""
    bits: tuple[int, ...] = (8, 4, 3, 2)
    """widths"""
    draws: int = 3
    """draws of calibration rows"""
    methods: tuple[str, ...] = tuple(METHODS)
    """rows of the table: rtn- is plain rounding, gptq- as published (no range search, no QEP)"""
    out: Path | None = None
    """also write the rows as JSON here, and a picture beside it"""
    threads: int = field(default_factory=torch.get_num_threads)
    """processor cores"""


def main(args: Args) -> list[dict[str, Any]]:
    """Measure all rows, print the table, and return it."""
    torch.set_num_threads(args.threads)
    directory = find_model(args.model, "give --model a model directory")
    tokenizer, _ = find_tokenizer(directory)
    full = load_model(directory, "cpu").float().eval()
    length = min(args.seq_len or 512, full.args.max_seq_len)
    rows = draw_rows(args.heldout, tokenizer, length, args.heldout_tokens, seed=1234)
    bench = Bench(args, directory, full, rows, torch.from_numpy(tokenizer.token_bytes())[rows[:, 1:]].sum(1))
    print(
        f"{directory}: {full.n_parameters():,} parameters; groups of {args.group_size}; {rows.numel():,} held-out "
        f"tokens in rows of {length}, {args.calib_tokens:,} calibration tokens, {args.draws} draws, "
        f"{args.threads} threads"
    )
    print(
        f"{'method':13}{'bits':>5}{'loss':>9}{'more nats':>20}{'of rounding':>14}{'bits/byte':>10}{'KL':>9}{'top-1':>8}"
        f"{'MB':>8}{'bits/w':>7}{'RSS MB':>8}{'prefill/s':>10}{'decode/s':>10}{'seconds':>9}"
    )
    table = [bench.measure("float32", 32, [full])]
    table.append(bench.measure("bfloat16", 16, [load_model(directory, "cpu", torch.bfloat16).eval()]))
    table.append(bench.measure("int8 cache", 32, [full], cache="int8"))
    for bits in args.bits:
        if bits == 4:
            nf4 = load_model(directory, "cpu").float().eval()
            quantize_base(nf4, "nf4", double_quant=False)
            table.append(bench.measure("nf4", 4, [nf4]))
        table += [bench.quantized(name, bits) for name in args.methods]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"args": asdict(args), "rows": table}, indent=2, default=str))
        draw(table, args.out.with_suffix(".png"))
    return table


class Bench:
    """What all rows of the table share: the model in full, the held-out rows (n, T), and their bytes (n,)."""

    def __init__(
        self, args: Args, directory: Path, full: Transformer, rows: torch.Tensor, row_bytes: torch.Tensor
    ) -> None:
        self.args, self.directory, self.full, self.rows, self.row_bytes = args, directory, full, rows, row_bytes
        self.base = self.losses(full)
        self.rounding: dict[int, float] = {}  # bits -> nats that plain rounding costs

    def quantized(self, name: str, bits: int) -> dict[str, Any]:
        """Return the row of a method and a width: its mean over draws of the calibration rows."""
        settings = METHODS[name]
        draws = 1 if settings["method"] == "rtn" else self.args.draws
        models, began = [], time.perf_counter()
        tokenizer, stop_ids = find_tokenizer(self.directory)
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(draws):
                options = {"bits": bits, "group_size": self.args.group_size, "format": FORMAT}
                if settings["method"] != "rtn":
                    options |= {"calib": self.args.calib, "calib_tokens": self.args.calib_tokens}
                    options |= {"seq_len": self.args.seq_len, "seed": seed}
                one = quantize.Args(Path(folder) / str(seed), self.directory, **options | settings)
                model = load_model(self.directory, "cpu").float().eval()
                quantize.quantize_in_place(model, tokenizer, one)
                models.append(model)
            seconds = (time.perf_counter() - began) / draws
            quantize.write(models[-1], tokenizer, stop_ids, one)
            return self.measure(name, bits, models, one.out, seconds)

    def measure(
        self,
        name: str,
        bits: int,
        models: Sequence[Transformer],
        directory: Path | None = None,
        seconds: float = 0.0,
        cache: str = "static",
    ) -> dict[str, Any]:
        """Return and print a row: means over `models`, of which the last one lies in `directory` (None: written
        here)."""
        each = [self.compare(model, cache) for model in models]
        more = [float(differences.mean()) for differences, _, _ in each]
        differences = torch.stack([differences for differences, _, _ in each]).mean(0)  # (n,)
        half = 1.96 * float(differences.std()) / math.sqrt(len(differences))
        row: dict[str, Any] = {"method": name, "bits": bits, "loss": float(self.base.mean()) + statistics.mean(more)}
        row |= {"more_nats": statistics.mean(more), "interval": [row_ for row_ in _around(statistics.mean(more), half)]}
        row |= {"more_nats_of_draws": more, "kl": statistics.mean(kl for _, kl, _ in each)}
        row["top1"] = statistics.mean(same for _, _, same in each)
        nats = row["loss"] * (self.rows.shape[1] - 1) * len(self.rows)
        row["bits_per_byte"] = nats / math.log(2) / float(self.row_bytes.sum())
        if name == "rtn-":
            self.rounding[bits] = more[0]
        if self.rounding.get(bits, 0) > 0:
            row["of_rounding"] = [min(more) / self.rounding[bits], max(more) / self.rounding[bits]]
        row |= self.costs(models[-1], directory, cache) | {"seconds": seconds}
        print(line(row), flush=True)
        return row

    @torch.inference_mode()
    def compare(self, model: Transformer, cache: str) -> tuple[torch.Tensor, float, float]:
        """Return, of a model beside the full one: the difference of each row's mean loss (n,), the KL divergence a
        token, and the share of tokens whose likeliest continuation is the same."""
        differences, kl, same = [], 0.0, 0.0
        for number, row in enumerate(self.rows):
            ours, full = logits_of(model, row, cache), logits_of(self.full, row)
            differences.append(float(cross_entropy(ours[:-1], row[1:])) - float(self.base[number]))
            p, q = log_softmax(full.double(), -1), log_softmax(ours.double(), -1)
            kl += float((p.exp() * (p - q)).sum(-1).mean()) / len(self.rows)
            same += float((p.argmax(-1) == q.argmax(-1)).double().mean()) / len(self.rows)
        return torch.tensor(differences), kl, same

    @torch.inference_mode()
    def losses(self, model: Transformer) -> torch.Tensor:
        """Return the mean loss of each held-out row, (n,)."""
        return torch.tensor([float(cross_entropy(logits_of(model, row)[:-1], row[1:])) for row in self.rows])

    def costs(self, model: Transformer, directory: Path | None, cache: str) -> dict[str, Any]:
        """Return sizes and speeds of a model."""
        speeds = speed(model, self.rows[0], cache)
        if any(layer.kind == "nf4" for layer in model.modules() if hasattr(layer, "kind")):
            return speeds  # there is no file of it
        with tempfile.TemporaryDirectory() as folder:
            if directory is None:
                directory = Path(folder)
                tokenizer, stop_ids = find_tokenizer(self.directory)
                save_model(directory, model, tokenizer, stop_ids)
            size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
            memory = {} if cache != "static" else {"resident": resident_bytes(directory, model.dtype)}
        return speeds | memory | {"bytes": size, "bits_per_weight": 8 * size / self.full.n_parameters()}


@torch.inference_mode()
def logits_of(model: Transformer, row: torch.Tensor, cache: str = "static") -> torch.Tensor:
    """Return the logits (T, V) after each token of a row (T,), as decoding computes them; through a cache of another
    kind in pieces of 32 tokens, so that most keys come from it."""
    piece = len(row) if cache == "static" else 32
    feed = Feeder(model, model.make_cache(1, len(row), kind=cache))
    parts = [feed([ids.tolist()], [at], len(ids))[0] for at, ids in zip(range(0, len(row), piece), row.split(piece))]
    return torch.cat(parts).float()


@torch.inference_mode()
def speed(model: Transformer, row: torch.Tensor, cache: str, repeats: int = 5, tokens: int = 48) -> dict[str, float]:
    """Return tokens a second of reading a prompt and of decoding after it, the best of some repeats."""
    prompt = row[: max(1, min(len(row) - tokens, 256))].tolist()
    reading, decoding = [], []
    for _ in range(repeats):
        feed = Feeder(model, model.make_cache(1, len(row), kind=cache))
        began = time.perf_counter()
        last = int(feed([prompt], [0])[0, -1].argmax())
        reading.append(time.perf_counter() - began)
        began = time.perf_counter()
        for position in range(len(prompt), len(row)):
            last = int(feed([[last]], [position])[0, -1].argmax())
        decoding.append((time.perf_counter() - began) / max(1, len(row) - len(prompt)))
    return {"prefill": len(prompt) / min(reading), "decode": 1 / min(decoding)}


def resident_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Return the memory that a process of its own has more after it has loaded a model and decoded 16 tokens."""
    code = (
        "import sys, torch\n"
        "from checkpoint.directory import load_model\n"
        "from decoding.generate import generate\n"
        "from decoding.params import SamplingParams\n"
        "def rss():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "before = rss()\n"
        f"model = load_model(sys.argv[1], 'cpu', {dtype}).eval()\n"
        "generate(model, [[1, 2, 3]], SamplingParams(temperature=0, max_new_tokens=16))\n"
        "print(rss() - before)\n"
    )
    command = [sys.executable, "-c", code, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        say(f"the memory of {directory} could not be measured: {done.stderr.strip()[-300:]}")
        return 0
    return int(done.stdout.split()[-1])


def line(row: dict[str, Any]) -> str:
    """Return a row of the table as text."""
    low, high = row["interval"]
    more = f"{row['more_nats']:+.4f} ±{(high - low) / 2:.4f}"
    share = "-".join(f"{value:.2f}" for value in row.get("of_rounding", ()))
    return (
        f"{row['method']:13}{row['bits']:5}{row['loss']:9.4f}{more:>20}{share:>14}{row['bits_per_byte']:10.4f}"
        f"{row['kl']:9.5f}{row['top1']:8.1%}{row.get('bytes', math.nan) / 1e6:8.2f}"
        f"{row.get('bits_per_weight', math.nan):7.2f}{row.get('resident', math.nan) / 1e6:8.1f}"
        f"{row['prefill']:10.0f}{row['decode']:10.0f}{row['seconds']:9.1f}"
    )


def _around(middle: float, half: float) -> tuple[float, float]:
    return middle - half, middle + half


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Draw what each row loses against its bits a weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["method"] for row in table):
        rows = [row for row in table if row["method"] == name and row.get("bytes") and row["more_nats"] > 0]
        points = [(row["bits_per_weight"], row["more_nats"]) for row in rows if name not in ("float32", "int8 cache")]
        if points:
            axes.plot(*zip(*points), marker="o", label=name)
    axes.set(xlabel="bits a weight, everything counted", ylabel="more nats a token than in float32", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

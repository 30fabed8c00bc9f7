"""What a row of the ladder measures: losses beside the full model's, sizes, memory and speed."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, log_softmax

from checkpoint import sharded
from checkpoint.safetensors_files import opened, weight_files
from cli.progress import say, track
from decoding.feeder import Feeder
from model import Transformer
from quant.replace import base_layers

Z = 1.96  # half of the 95 % interval of a mean, in standard errors


class Comparison(NamedTuple):
    """Some models beside the full one on n held-out rows."""

    losses: torch.Tensor
    """mean loss of each model on each row, (models, n), in nats a token"""
    base: torch.Tensor
    """mean loss of the full model on each row, (n,)"""
    kl: list[float]
    """KL divergence of the full model's predictions to those of each model, in nats a token"""
    top1: list[float]
    """share of tokens after which each model finds the same continuation likeliest as the full model"""


@torch.inference_mode()
def compare(full: Transformer, models: Sequence[Transformer], rows: torch.Tensor, cache: str = "static") -> Comparison:
    """Return the losses of models on rows (n, T), computed as decoding computes them; cache: the models' kind."""
    losses, base = torch.zeros(len(models), len(rows)), torch.zeros(len(rows))
    kl, same = [0.0] * len(models), [0.0] * len(models)
    for number, row in enumerate(track(rows, "measuring", "rows", len(rows))):
        wanted = logits_of(full, row)  # (T, V)
        base[number] = cross_entropy(wanted[:-1], row[1:])  # logits after token t predict token t + 1
        p = log_softmax(wanted.double(), -1)  # (T, V)
        for i, model in enumerate(models):
            found = logits_of(model, row, cache)  # (T, V)
            losses[i, number] = cross_entropy(found[:-1], row[1:])
            q = log_softmax(found.double(), -1)
            # KL(p || q) at each of T places, then the mean over places and rows
            kl[i] += float((p.exp() * (p - q)).sum(-1).mean()) / len(rows)
            same[i] += float((p.argmax(-1) == q.argmax(-1)).double().mean()) / len(rows)
    return Comparison(losses, base, kl, same)


def figures(found: Comparison, bytes_per_token: float) -> dict[str, Any]:
    """Return the figures of a row: means over the models, with half the width of their 95 % intervals over rows.

    `more_nats` is the loss less the full model's on the same rows, whose interval is much narrower than the loss's.
    """
    losses = found.losses.double().mean(0)  # (n,)
    differences, per_bit = losses - found.base.double(), math.log(2) * bytes_per_token
    return {
        "loss": float(losses.mean()),
        "loss_half": half(losses),
        "bits_per_byte": float(losses.mean()) / per_bit,
        "bits_per_byte_half": half(losses) / per_bit,
        "more_nats": float(differences.mean()),
        "more_nats_half": half(differences),
        "more_nats_of_draws": (found.losses.double() - found.base.double()).mean(1).tolist(),
        "kl": sum(found.kl) / len(found.kl),
        "top1": sum(found.top1) / len(found.top1),
    }


def half(values: torch.Tensor) -> float:
    """Return half the width of the 95 % interval of the mean of values (n,); nan for a single one."""
    return Z * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@torch.inference_mode()
def logits_of(model: Transformer, row: torch.Tensor, cache: str = "static") -> torch.Tensor:
    """Return the logits (T, V) after each token of a row (T,), as decoding computes them; through a cache of another
    kind in pieces of 32 tokens, so that most keys come from it."""
    piece = len(row) if cache == "static" else 32
    feed = Feeder(model, model.make_cache(1, len(row), kind=cache))
    parts = [feed([ids.tolist()], [at], len(ids))[0] for at, ids in zip(range(0, len(row), piece), row.split(piece))]
    return torch.cat(parts).float()


# ---- speed


def speeds(model: Transformer, full: Transformer, row: torch.Tensor, cache: str, repeats: int = 5) -> dict[str, float]:
    """Return tokens a second of reading a prompt and of decoding after it, the best of some repeats, and what they are
    of the full model's, which is measured in turns with it: other programs slow both."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        for name, each, kind in (("", model, cache), ("full_", full, "static")):
            reading, decoding = one_speed(each, row, kind)
            best[f"{name}prefill"] = max(best.get(f"{name}prefill", 0.0), reading)
            best[f"{name}decode"] = max(best.get(f"{name}decode", 0.0), decoding)
    of_full = {f"{name}_of_full": best[name] / best.pop(f"full_{name}") for name in ("prefill", "decode")}
    return best | of_full


@torch.inference_mode()
def one_speed(model: Transformer, row: torch.Tensor, cache: str, tokens: int = 48) -> tuple[float, float]:
    """Return tokens a second of reading the beginning of a row (T,), and of decoding up to `tokens` after it."""
    prompt = row[: max(1, min(len(row) - tokens, 256))].tolist()
    room = min(len(row), len(prompt) + tokens)
    feed = Feeder(model, model.make_cache(1, room, kind=cache))
    began = time.perf_counter()
    last = int(feed([prompt], [0])[0, -1].argmax())
    reading = time.perf_counter() - began
    began = time.perf_counter()
    for position in range(len(prompt), room):
        last = int(feed([[last]], [position])[0, -1].argmax())
    return len(prompt) / reading, max(1, room - len(prompt)) / (time.perf_counter() - began)


# ---- sizes


def sizes(directory: Path, model: Transformer) -> dict[str, float]:
    """Return what the directory of a model, or of a quantized copy of `model`, takes: bytes of its weight files, the
    same in bits for each parameter of `model`, and bits for each weight of the linear layers alone, their scales and
    zero points counted. Of a sharded checkpoint, whose files hold the optimizer's moments, too, the weights alone
    count."""
    linear, of_linear, of_all, files = dict(base_layers(model)), 0, 0, weight_files(directory)
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                n_bytes = file.get_tensor(name).nbytes
                of_all += n_bytes
                if any(name.startswith(f"{layer}.") for layer in linear):
                    of_linear += n_bytes
    size = of_all if files == sharded.files_of(directory) else sum(path.stat().st_size for path in files)
    weights = sum(layer.in_features * layer.out_features for layer in linear.values())
    return {
        "bytes": size,
        "bits_per_parameter": 8 * size / model.n_parameters(),
        "bits_per_weight": 8 * of_linear / weights,
    }


def resident_bytes(directory: Path, dtype: torch.dtype) -> int | None:
    """Return the memory that a process of its own has more after it has loaded a model and decoded 16 tokens; None,
    with a notice, where that cannot be measured."""
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
    command = [sys.executable, "-c", code, str(directory.absolute())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        say(f"the memory of {directory} could not be measured: {done.stderr.strip()[-300:]}")
        return None
    return int(done.stdout.split()[-1])

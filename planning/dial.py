"""One dial: from a number of parameters and of tokens to shape, batch, rates and horizon of a run.

shape    dim / layers near 64 and heads of 64 (32 below a width of 256), as in nanochat's models of depth 4 to 32
batch    2^19 tokens at 1.2e9 tokens, growing with tokens^0.383 (Bergsma et al. 2025, arXiv:2505.13738, for the
         exponent; nanochat's depth 12 for the point), and at most a thousandth of all tokens: 1,000 steps or more
rates    those of our presets tiny (dim 128: 4e-3, Muon 6e-3) and base (1024: 1e-3, 3e-3), by powers of the width
tokens   20x: twenty for each parameter (Hoffmann et al. 2022, arXiv:2203.15556)
warm-up  2 % of the steps, 20 to 500
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

from model_args import ModelArgs
from optim.args import OptimArgs

UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}
OWN = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")  # fields that it sets
FEWEST_STEPS, MICRO_TOKENS = 1000, 16384
LEAST, MOST = 10_000, 10**12


class Recipe(NamedTuple):
    """What the dial says."""

    model: dict[str, Any]
    """fields of ModelArgs"""
    optim: dict[str, Any]
    batch_size: int
    """rows of an optimizer step"""
    micro_batch_size: int
    max_steps: int
    tokens: float


def number(text: str, flag: str) -> float:
    """Return the number in "15M", "1.1B" or "300k". Raises ValueError, whose subject is `flag`, for another text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.strip().lower())
    if not found or not LEAST <= float(found[1]) * UNITS[found[2]] <= MOST:
        raise ValueError(f"--{flag} should be a number such as 300k, 15M or 1.1B, 10k to 1000B, found {text!r:.60}")
    return float(found[1]) * UNITS[found[2]]


def tokens_of(text: str, n_parameters: int) -> float:
    """Return the tokens of "300M", or of "20x": so many for each parameter."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)x", text.strip().lower()):
        if not 0.01 <= float(found[1]) <= 1e5:
            raise ValueError(f"--tokens should be 0.01x to 100000x, found {text!r:.60}")
        return float(found[1]) * n_parameters
    return number(text, "tokens")


def shape_for(n_parameters: float, vocab_size: int, base: ModelArgs) -> ModelArgs:
    """Return the shape nearest to a number of parameters, embeddings included; base: has all fields but the sizes.

    Raises ValueError where the embeddings alone have more.
    """
    others = {f.name: getattr(base, f.name) for f in dataclasses.fields(ModelArgs) if f.name not in OWN}
    best: tuple[float, float, ModelArgs] | None = None
    for layers in range(2, 129):
        for dim in range(32, 16385, 32):
            head = 64 if dim >= 256 else 32
            if dim % head or not 32 <= dim / layers <= 128:
                continue
            if best and 12 * dim * dim * layers > 3 * n_parameters:
                break
            sizes = {"dim": dim, "n_layers": layers, "n_heads": dim // head, "vocab_size": vocab_size}
            shape = ModelArgs(**others | sizes)
            off = abs(math.log(shape.n_parameters() / n_parameters))
            # within 3 % of each other, the one whose ratio is nearer to 64
            rank = (round(off / 0.03), abs(math.log(dim / layers / 64)), shape)
            if best is None or rank[:2] < best[:2]:
                best = rank
    if abs(math.log(best[2].n_parameters() / n_parameters)) > 0.25:
        raise ValueError(
            f"--params {n_parameters:,.0f} and a vocabulary of {vocab_size:,}: the nearest model has "
            f"{best[2].n_parameters():,} parameters; choose a smaller vocabulary or more parameters"
        )
    return best[2]


def turn(params: str, tokens: str, vocab_size: int, seq_len: int, base: ModelArgs) -> Recipe:
    """Return the recipe for `--params` and `--tokens`; seq_len: tokens of a row."""
    shape = shape_for(number(params, "params"), vocab_size, base)
    total = tokens_of(tokens, shape.n_parameters())
    batch = min(2**19 * (total / 1.2e9) ** 0.383, total / FEWEST_STEPS)
    rows = max(1, 2 ** round(math.log2(max(1.0, batch / seq_len))))
    steps = max(1, math.ceil(total / (rows * seq_len)))
    rates = {"lr": 4e-3 * (128 / shape.dim) ** (2 / 3), "muon_lr": 6e-3 * (128 / shape.dim) ** (1 / 3)}
    rates = {name: float(f"{value:.2g}") for name, value in rates.items()}
    warmup = min(500, max(20, round(0.02 * steps)))
    micro = max(1, min(rows, MICRO_TOKENS // seq_len))
    model = {name: getattr(shape, name) for name in OWN if name != "vocab_size"}
    return Recipe(model, rates | {"warmup_steps": warmup}, rows, 0 if micro == rows else micro, steps, total)


def changed_optim(optim: OptimArgs, recipe: Recipe) -> OptimArgs:
    """Return the settings of the optimizer with the rates of a recipe."""
    return dataclasses.replace(optim, **recipe.optim)

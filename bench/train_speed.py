"""Measure tokens a second of a training step against transformers' LlamaForCausalLM: same shapes, data and optimizer.

    python bench/train_speed.py                          # 2, 15 and 60 million parameters, float32 and bfloat16
    python bench/train_speed.py --sizes 2M --repeats 9

All variants of one size and dtype take turns in one process, step by step, so that a change of the machine's speed
affects them all; the table has the median step. A step is forward, backward, clip, fused AdamW. The machine's matmul
rate is measured in the same run, and model flops (see training/flops.py) are printed as a share of it. In float32, our
products are computed as training chooses (hardware.exact_float32_matmul), those of transformers in PyTorch's usual way.

Another machine is imitated by ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 before it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.extras import need

need("bench/train_speed.py", "bench", "transformers")

from checkpoint import config_json
from hardware import exact_float32_matmul, float32_matmul, matmul_rate
from model import Transformer
from model_args import ModelArgs
from training.flops import train_flops_per_token

SHAPES = {  # name -> shape, rows, tokens a row
    "2M": (ModelArgs(dim=160, n_layers=5, n_heads=5, vocab_size=4800), 32, 128),
    "15M": (ModelArgs(dim=288, n_layers=6, n_heads=6, vocab_size=32000), 8, 256),
    "60M": (ModelArgs(dim=512, n_layers=14, n_heads=8, vocab_size=32000, hidden_dim=1376), 4, 256),
}
VARIANTS = ("ours compiled", "ours eager", "transformers", "transformers compiled")


@dataclass(frozen=True)
class Args:
    """Compare the speed of training steps."""

    sizes: tuple[Literal["2M", "15M", "60M"], ...] = ("2M", "15M", "60M")
    """models to measure"""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """float32, or bfloat16 activations (transformers: autocast)"""
    variants: tuple[Literal[VARIANTS], ...] = VARIANTS  # type: ignore[valid-type]
    """variants to compare"""
    float32_matmul: Literal["auto", "highest", "medium"] = "auto"
    """torch.set_float32_matmul_precision for all variants; auto: each in its own way"""
    repeats: int = 7
    """measured steps of each variant, after two of warm-up"""
    threads: int = torch.get_num_threads()
    """processor cores"""
    out: Path | None = None
    """also write the rows as JSON"""


def make_step(variant: str, args: ModelArgs, bf16: bool, tokens: torch.Tensor) -> tuple[Callable[[], float], nn.Module]:
    """Return a function that does one training step and returns its loss per token; and the model."""
    torch.manual_seed(0)
    ours = Transformer(args)
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
    if variant.startswith("ours"):
        model = ours
        model.compute_dtype = torch.bfloat16 if bf16 else torch.float32
    else:
        model = peer(ours)
    if variant.endswith("compiled"):
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of() -> torch.Tensor:
        if model is ours:
            total, count = model(tokens, targets)
            return total / count
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def step() -> float:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, model


def peer(ours: Transformer) -> nn.Module:
    """Return transformers' model with the same shape and weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**config_json.write(ours.args))
    model = LlamaForCausalLM(config)
    model.load_state_dict(ours.state_dict())
    return model.train()


def measure(name: str, dtype: str, args: Args) -> list[dict]:
    """Return the rows of the table for one size and dtype."""
    shape, rows, length = SHAPES[name]
    tokens = torch.randint(0, shape.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    steps, losses, ways = {}, {}, {}
    best = exact_float32_matmul(torch.device("cpu")) if args.float32_matmul == "auto" else args.float32_matmul
    for variant in args.variants:
        theirs = args.float32_matmul == "auto" and not variant.startswith("ours")
        ways[variant] = "highest" if theirs else best
        steps[variant], _ = make_step(variant, shape, dtype == "bf16", tokens)
        with float32_matmul(ways[variant]):
            losses[variant] = [steps[variant]() for _ in range(2)][-1]  # compiles, warms up
    seconds: dict[str, list[float]] = {variant: [] for variant in args.variants}
    for _ in range(args.repeats):
        for variant, step in steps.items():
            with float32_matmul(ways[variant]):
                start = time.perf_counter()
                step()
                seconds[variant].append(time.perf_counter() - start)
    with float32_matmul(best):
        rate = matmul_rate(torch.device("cpu"), torch.bfloat16 if dtype == "bf16" else torch.float32)
    flops = train_flops_per_token(shape, length) * rows * length
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    table = []
    for variant, median in medians.items():
        row = {"model": name, "dtype": dtype, "variant": variant, "tokens_per_second": rows * length / median}
        row |= {"share_of_matmul_rate": flops / median / rate, "matmul_gflops": rate / 1e9, "loss": losses[variant]}
        if "transformers" in medians:
            row["times_transformers"] = medians["transformers"] / median
        table.append(row)
    return table


def main(args: Args) -> list[dict]:
    """Measure, print a table, and return its rows."""
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.repeats} interleaved steps, medians")
    print(f"{'model':6}{'dtype':6}{'variant':23}{'tok/s':>8}{'x transformers':>16}{'of matmul rate':>16}{'loss':>9}")
    table = []
    for name in args.sizes:
        for dtype in args.dtypes:
            for row in measure(name, dtype, args):
                table.append(row)
                print(
                    f"{name:6}{dtype:6}{row['variant']:23}{row['tokens_per_second']:8.0f}"
                    f"{row.get('times_transformers', float('nan')):16.2f}{row['share_of_matmul_rate']:15.0%} "
                    f"{row['loss']:9.4f}",
                    flush=True,
                )
            torch._dynamo.reset()
    if args.out:
        args.out.write_text(json.dumps(table, indent=2))
    return table


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

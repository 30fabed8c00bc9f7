"""Measure the peak memory of a training step with a vocabulary of 64 k, against transformers' LlamaForCausalLM.

    python bench/memory.py
    python bench/memory.py --vocab_size 32000 --rows 16

Each variant runs in its own process: resident memory is read when the model exists, and its peak after two steps of
forward, backward and AdamW. The last column excludes gradients and optimizer states, which all variants have.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.extras import need

need("bench/memory.py", "bench", "psutil", "transformers")
import psutil

from bench.train_speed import make_step
from model_args import ModelArgs

VARIANTS = ("ours eager", "ours checkpointed", "transformers")


@dataclass(frozen=True)
class Args:
    """Compare the peak memory of training steps."""

    vocab_size: int = 65536
    """number of rows of the embedding and of the head"""
    dim: int = 256
    """width of the model"""
    n_layers: int = 6
    """number of blocks"""
    rows: int = 8
    """sequences in a step"""
    length: int = 256
    """tokens in a sequence"""
    bf16: bool = True
    """bfloat16 activations (transformers: autocast)"""
    variant: str = ""
    """variant to measure in this process, with JSON as output; empty: all of them"""


def peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes. (That of getrusage starts at its parent's.)"""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(args: Args) -> dict[str, float]:
    """Return the memory of this process in MiB: with the model, at the peak of two steps, and of a step alone."""
    shape = ModelArgs(dim=args.dim, n_layers=args.n_layers, n_heads=args.dim // 32, vocab_size=args.vocab_size)
    tokens = torch.randint(0, args.vocab_size, (args.rows, args.length))
    step, model = make_step(args.variant.replace("checkpointed", "eager"), shape, args.bf16, tokens)
    if args.variant == "ours checkpointed":
        model.gradient_checkpointing = True
    before = psutil.Process().memory_info().rss
    for _ in range(2):
        step()
    peak = peak_bytes()
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": before / 2**20, "peak": peak / 2**20, "step": (peak - before - 12 * parameters) / 2**20}


def main(args: Args) -> dict[str, dict[str, float]]:
    """Measure every variant in its own process, print a table in MiB, and return its rows."""
    if args.variant:
        result = measure(args)
        print(json.dumps(result))
        return {args.variant: result}
    tokens = args.rows * args.length
    logits = tokens * args.vocab_size * 4 / 2**20
    print(f"{tokens} tokens, vocabulary {args.vocab_size}: all logits in float32 are {logits:.0f} MiB")
    print(f"{'MiB':20}{'with model':>12}{'peak':>10}{'activations and loss':>24}")
    table = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--variant", variant]
        for name in ("vocab_size", "dim", "n_layers", "rows", "length", "bf16"):
            command += [f"--{name}", str(getattr(args, name))]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        table[variant] = row = json.loads(out.splitlines()[-1])
        print(f"{variant:20}{row['model']:12.0f}{row['peak']:10.0f}{row['step']:24.0f}", flush=True)
    return table


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, config=(tyro.conf.FlagConversionOff,)))

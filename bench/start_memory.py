"""Measure what each process of a new model takes until its first step: whole, then divided; or drawn in parts.

    torchrun --nproc_per_node 2 bench/start_memory.py --ways whole
    torchrun --nproc_per_node 2 bench/start_memory.py --ways parts

The peak is that of resident memory (VmHWM), less what the process had before there was a model. AdamW has no moments
before its first step. The sum of all weights tells that both ways start with the same ones.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from distributed.backend import make_backend
from model import Transformer
from model_args import ModelArgs
from optim.args import OptimArgs
from optim.optimizers import build_optimizer


@dataclass(frozen=True)
class Args:
    """Start a model of about 320 M parameters on several processes, one way a call."""

    ways: Literal["whole", "parts"] = "parts"
    """whole: every process makes the whole model first; parts: as pretrain.py does under fsdp"""
    dim: int = 1024
    """width; 16 heads"""
    n_layers: int = 20
    """number of blocks"""


def status(field: str) -> int:
    """Return a field of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1000 for line in lines if line.startswith(field))


def main(args: Args) -> None:
    """Start the model; the main process prints a line for each process."""
    shape = ModelArgs(args.dim, args.n_layers, n_heads=16, vocab_size=32_000, tie_embeddings=False)
    with make_backend("fsdp", "cpu") as backend:
        optim = OptimArgs(optimizer="adamw")
        tiny = Transformer(ModelArgs(32, 2, n_heads=2, vocab_size=64, tie_embeddings=False))
        backend.wrap(tiny, build_optimizer(tiny, optim))  # loads what the first start loads
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, began = status("VmRSS"), time.monotonic()
        torch.manual_seed(0)
        with torch.device("meta" if args.ways == "parts" else "cpu"):
            model = Transformer(shape, initialize=args.ways == "whole")
        backend.wrap(model, build_optimizer(model, optim))
        parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        found = {
            "peak MB": status("VmHWM") - before,
            "at the end MB": status("VmRSS") - before,
            "its weights MB": 4 * sum(p.numel() for p in parts) // 1_000_000,
            "seconds": round(time.monotonic() - began, 1),
        }
        total = backend.sum([sum(p.detach().double().abs().sum().item() for p in parts)])[0]
        for rank, row in enumerate(backend.gather(found)):
            if backend.main:
                print(f"{args.ways}, process {rank} of {backend.world}:", row)
        if backend.main:
            print(f"{shape.n_parameters():,} parameters, {4 * shape.n_parameters() // 1_000_000} MB; |w| = {total:.9g}")


if __name__ == "__main__":
    main(tyro.cli(Args))

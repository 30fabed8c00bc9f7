"""Compare the time of a training step that `plan.py --measure` predicts from models of 1 and 3 blocks with that of the
whole model, on this machine: seconds of one processor, so that other programs do not count.

    python bench/plan.py
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_args import ModelArgs
from planning.measure import measure, times_of
from planning.memory import Step
from planning.tables import table

CASES = {
    "1.8 M, Muon": (ModelArgs(dim=128, n_layers=6, n_heads=4, vocab_size=4800), Step(8, 128, "fp32", "muon")),
    "8 M, recomputed": (
        ModelArgs(dim=256, n_layers=8, n_heads=8, n_kv_heads=4, vocab_size=8000),
        Step(4, 128, "fp32", checkpointing=True),
    ),
    "6 M, bf16, many blocks": (
        ModelArgs(dim=192, n_layers=12, n_heads=6, n_kv_heads=2, vocab_size=4800),
        Step(2, 256, "bf16"),
    ),
}


@dataclass(frozen=True)
class Args:
    """Compare predicted and measured times of a step."""

    seconds: float = 10.0
    """time for a prediction, and for a measurement"""


def main(args: Args) -> dict[str, float]:
    """Print a table; return the relative errors."""
    torch.set_num_threads(1)
    rows, errors = [], {}
    for name, (shape, step) in CASES.items():
        predicted = measure(shape, step, args.seconds, time.process_time).step(1)
        measured = times_of([shape], step, args.seconds, time.process_time)[0].step(1)
        errors[name] = predicted / measured - 1
        rows.append((name, f"{predicted:.3f}", f"{measured:.3f}", f"{errors[name]:+.0%}"))
    print(table(("seconds of a step", "predicted", "measured", "error"), rows))
    return errors


if __name__ == "__main__":
    main(tyro.cli(Args))

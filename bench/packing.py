"""Measure useful targets a second of fine-tuning steps with each packing, in one run.

    python bench/packing.py --data alpaca_zh.json sharegpt_zh.jsonl

All packings train the same small model with random weights on the same samples of a file and take turns, step by step,
so that a machine whose speed drifts slows all of them. Their steps have about as many positions. A useful position has
a target; the others hold questions, markers and padding.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from chat.samples import Samples, read_samples
from chat.template import load_template
from dataset_sft import PACKINGS, SFTData
from model import Transformer
from model_args import ModelArgs
from tokenizer import load_tokenizer


@dataclass(frozen=True)
class Args:
    """Compare packings."""

    data: tuple[Path, ...] = (Path("data/tiny/sft_heldout.jsonl"),)
    """files of conversations"""
    tokenizer: Path = Path("data/tiny/tokenizer")
    """a tokenizer, or a model directory with one"""
    seq_len: int = 512
    """positions of a row; longer samples are cut"""
    rows: int = 4
    """rows of a packed step; a padded step has as many rows as give about the same number of positions"""
    repeats: int = 10
    """measured steps of each packing, after a first one that is not measured"""
    dim: int = 160
    """width of the model, of 5 blocks and 5 heads"""


class Trial:
    """Steps on one packing of the samples, with a model of its own."""

    def __init__(self, samples: Samples, packing: str, args: Args, vocab_size: int) -> None:
        data = SFTData(samples, args.seq_len, args.rows, 0, packing)
        n_positions = (len(samples.ids) - len(samples)) / data.packing_efficiency
        rows = round(args.rows * args.seq_len * data.n_rows / n_positions)  # of the mean width
        self.name, self.data = packing, SFTData(samples, args.seq_len, rows, 0, packing)
        torch.manual_seed(0)
        self.model = Transformer(ModelArgs(args.dim, 5, 5, vocab_size=vocab_size, max_seq_len=args.seq_len))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.seconds, self.positions = [], 0

    def step(self, number: int) -> None:
        """Train on one batch and record the seconds that it takes."""
        began = time.perf_counter()
        batch = self.data.batch(number % self.data.steps_per_epoch)
        loss, count = self.model(batch.tokens, batch.targets, positions=batch.positions, doc_ids=batch.doc_ids)
        (loss / count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)
        self.positions += batch.tokens.numel()

    def row(self) -> dict[str, Any]:
        """Return the measurements as a row of the table."""
        n_targets = self.data.samples.stats["targets"]
        n_positions = (len(self.data.samples.ids) - len(self.data.samples)) / self.data.packing_efficiency
        return {
            "packing": self.name,
            "filled": self.data.packing_efficiency,
            "useful": n_targets / n_positions,
            "step_ms": 1e3 * statistics.median(self.seconds),
            # The rate of positions is measured; targets per position are those of a whole epoch, because the share of
            # targets varies too much between a few batches.
            "targets_per_second": n_targets / n_positions * self.positions / sum(self.seconds),
        }


def measure(samples: Samples, args: Args, vocab_size: int) -> list[dict[str, Any]]:
    """Return a row of measurements for each packing."""
    trials = [Trial(samples, packing, args, vocab_size) for packing in PACKINGS]
    order = np.random.default_rng(0)
    for number in range(args.repeats + 1):
        for i in order.permutation(len(trials)):
            trials[i].step(number)
        if number == 0:  # the first step allocates memory
            for trial in trials:
                trial.seconds, trial.positions = [], 0
    return [trial.row() for trial in trials]


def main(args: Args) -> list[dict[str, Any]]:
    """Print a table for each file; return the rows of all."""
    template = load_template(load_tokenizer(args.tokenizer))
    results = []
    for path in args.data:
        samples = read_samples(path, template, args.seq_len)
        lengths = np.diff(samples.offsets.astype(np.int64))
        print(f"{path.name}: {len(samples)} samples of {lengths.mean():.0f} tokens, {samples.stats['cut']} of them cut")
        rows = measure(samples, args, template.tokenizer.vocab_size)
        slowest = next(row["targets_per_second"] for row in rows if row["packing"] == "none")
        print(f"{'packing':>10} {'filled':>8} {'useful':>8} {'step':>9} {'targets/s':>10} {'of none':>8}")
        for row in rows:
            rate = row["targets_per_second"]
            print(
                f"{row['packing']:>10} {row['filled']:8.1%} {row['useful']:8.1%} {row['step_ms']:6.0f} ms "
                f"{rate:10.0f} {rate / slowest:8.2f}"
            )
        results += [row | {"file": path.name} for row in rows]
    return results


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

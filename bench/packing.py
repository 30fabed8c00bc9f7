"""Measure trained targets a second of fine-tuning steps: samples packed into rows against padded samples.

    python bench/packing.py --data alpaca_zh.json sharegpt_zh.jsonl

All packings train the same small model with random weights on the same samples of a file and take turns, step by step,
so that a change of the machine's speed affects them all. Their steps have about the same number of positions. A useful
target is one that is trained; the rest are questions, markers and padding.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from chat.samples import Samples, read_samples
from chat.template import load_template
from dataset_sft import SFTData
from model import Transformer
from model_args import ModelArgs
from tokenizer import load_tokenizer
from tuning.args import Packing


@dataclass(frozen=True)
class Args:
    """Compare packings."""

    data: tuple[Path, ...] = (Path("data/tiny/sft_heldout.jsonl"),)
    """files of conversations"""
    tokenizer: Path = Path("data/tiny/tokenizer")
    """tokenizer with the chat template"""
    seq_len: int = 512
    """positions of a row; longer samples are cut"""
    rows: int = 4
    """rows of a step with packing; without it, as many rows as have about the same number of positions"""
    repeats: int = 10
    """measured steps of each packing, after one warm-up"""
    dim: int = 160
    """width of the model, which has 5 blocks and 5 heads"""


class Contestant:
    """One packing of the samples, with a model to train on it."""

    def __init__(self, samples: Samples, packing: Packing, args: Args, vocab_size: int) -> None:
        data = SFTData(samples, args.seq_len, args.rows, 0, packing)
        n_positions = (len(samples.ids) - len(samples)) / data.packing_efficiency
        rows = round(args.rows * args.seq_len * data.n_rows / n_positions)  # rows of mean width
        self.name, self.data = packing, SFTData(samples, args.seq_len, rows, 0, packing)
        torch.manual_seed(0)
        self.model = Transformer(ModelArgs(args.dim, 5, 5, vocab_size=vocab_size, max_seq_len=args.seq_len))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.seconds, self.positions = [], 0

    def step(self, number: int) -> None:
        """Train on one batch and record its time."""
        began = time.perf_counter()
        batch = self.data.batch(number % self.data.steps_per_epoch)
        loss, count = self.model(batch.tokens, batch.targets, positions=batch.positions, doc_ids=batch.doc_ids)
        (loss / count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)
        self.positions += batch.tokens.numel()

    def row(self) -> dict[str, Any]:
        """Return the row of the table."""
        n_targets = self.data.samples.stats["targets"]
        n_positions = (len(self.data.samples.ids) - len(self.data.samples)) / self.data.packing_efficiency
        return {
            "packing": self.name,
            "filled": self.data.packing_efficiency,
            "useful": n_targets / n_positions,
            "step_ms": 1e3 * statistics.median(self.seconds),
            # time from the measured steps, targets from the whole epoch: their share varies between batches
            "targets_per_second": n_targets / n_positions * self.positions / sum(self.seconds),
        }


def main(args: Args) -> list[dict[str, Any]]:
    """Print a table for each file; return the rows of all tables."""
    template = load_template(load_tokenizer(args.tokenizer))
    results = []
    for path in args.data:
        samples = read_samples(path, template, args.seq_len)
        lengths = np.diff(samples.offsets.astype(np.int64))
        print(f"{path.name}: {len(samples)} samples of {lengths.mean():.0f} tokens, {samples.stats['cut']} of them cut")
        vocab_size = template.tokenizer.vocab_size
        contestants = [Contestant(samples, packing, args, vocab_size) for packing in get_args(Packing)]
        order = np.random.default_rng(0)
        for number in range(args.repeats + 1):
            for i in order.permutation(len(contestants)):
                contestants[i].step(number)
            if number == 0:
                for one in contestants:
                    one.seconds, one.positions = [], 0
        rows = [one.row() | {"file": path.name} for one in contestants]
        slowest = next(row["targets_per_second"] for row in rows if row["packing"] == "none")
        print(f"{'packing':>10} {'filled':>8} {'useful':>8} {'step':>9} {'targets/s':>10} {'of none':>8}")
        for row in rows:
            rate = row["targets_per_second"]
            print(
                f"{row['packing']:>10} {row['filled']:8.1%} {row['useful']:8.1%} {row['step_ms']:6.0f} ms "
                f"{rate:10.0f} {rate / slowest:8.2f}"
            )
        results += rows
    return results


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

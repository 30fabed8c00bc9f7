"""Compare ways to weigh the losses of several tasks in one run: the held-out loss of every task, and the spread.

    python bench/tasks.py --model DIR --data poems.jsonl alpaca.json medical.jsonl kdconv.jsonl

Every run is full fine-tuning by `fine_tuning.main` on the same conversations in the same order; only --data.loss
differs. A task is a file. Losses of different tasks are not comparable, so the table also has the gain of each task as
a share of its loss before training; the spread is the difference between the largest and the smallest gain.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.extras import need

need("bench/tasks.py", "bench", "psutil", "transformers")

import fine_tuning
from bench.finetune import UNTRAINED, Job, conversations, placed, run_all
from lora.adapters import LoraArgs
from optim.args import OptimArgs
from training.trainer import TrainArgs
from tuning.args import DataArgs, task_names

LOSSES = {"token": "case1", "sample": "case2", "task_token": "case3", "task_sample": "case4"}


@dataclass(frozen=True)
class Args:
    """Compare ways to weight the losses of tasks."""

    model: Path
    """the model to start from"""
    data: tuple[Path, ...]
    """files of conversations, one for each task"""
    records: int = 2000
    """number of conversations of a task, drawn at random; a tenth as many are held out"""
    losses: tuple[str, ...] = tuple(LOSSES)
    """values of fine_tuning.py's --data.loss to compare"""
    steps: int = 100
    """optimizer steps of a run"""
    rows: int = 8
    """rows of a step"""
    seq_len: int = 256
    """tokens in a row"""
    lr: float = 3e-3
    """learning rate of AdamW"""
    seeds: int = 2
    """number of runs of each"""
    jobs: int = 2
    """parallel runs, one thread each"""
    out: Path = Path("out/bench/tasks")
    """directory of runs and results.json"""


def job(args: Args, files: list[tuple[Path, Path]], loss: str, seed: int) -> Job:
    """Return the job of one run; the untrained model is measured by one step with a learning rate of 0."""
    lr, steps = (args.lr, args.steps) if loss != UNTRAINED else (0.0, 1)
    data = DataArgs(*map(tuple, zip(*files)), seq_len=args.seq_len, batch_size=args.rows)
    return placed(
        loss,
        fine_tuning.Args(
            data=replace(data, loss=loss) if lr else data,
            optim=OptimArgs("adamw", lr=lr, schedule="linear", warmup_steps=steps // 10, weight_decay=0.0),
            lora=LoraArgs(),
            train=TrainArgs(max_steps=steps, compile="off", seed=seed, eval_interval=0, save_interval=0, keep=1),
            init_from=args.model,
        ),
        args.out / "runs",
    )


def markdown(names: list[str], losses: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table with a row for each way to weigh and a column for each task."""
    before = losses[UNTRAINED]
    lines = ["| | " + " | ".join([*names, "their mean", "gained, of the loss before", "spread"]) + " |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for loss, after in losses.items():
        cells = [f"{after[name]:.4f}" for name in names] + [f"{statistics.mean(after[name] for name in names):.4f}"]
        gains = [1 - after[name] / before[name] for name in names]
        cells += [f"{min(gains):.1%} to {max(gains):.1%}", f"{max(gains) - min(gains):.1%}"]
        label = f"{loss} ({LOSSES[loss]})" if loss in LOSSES else loss
        lines.append(f"| {label} | " + " | ".join(cells if loss != UNTRAINED else [*cells[:-2], "", ""]) + " |")
    return "\n".join(lines)


def main(args: Args) -> dict[str, Any]:
    """Measure, print a Markdown table, write results.json."""
    files = [conversations(path, None, args.records, args.out) for path in args.data]
    names = task_names([train for train, _ in files])
    jobs = [job(args, files, UNTRAINED, 0)]
    jobs += [job(args, files, loss, seed) for seed in range(args.seeds) for loss in args.losses]
    rows = run_all(jobs, args.jobs)
    losses = {}
    for loss in (UNTRAINED, *args.losses):
        runs = [row for row in rows if row["name"] == loss]
        losses[loss] = {name: statistics.mean(row[f"loss/{name}"] for row in runs) for name in names}
    counts = {name: len(train.read_text(encoding="utf8").splitlines()) for name, (train, _) in zip(names, files)}
    print(f"\nconversations: {counts}; {args.steps} steps of {args.rows} x {args.seq_len} tokens, {args.seeds} seeds\n")
    print(markdown(names, losses))
    results = {"conversations": counts, "losses": losses, "runs": rows}
    (args.out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf8")
    return results


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, config=(tyro.conf.FlagConversionOff,)))

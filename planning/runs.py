"""What a run has done so far, from the files in its directory; without torch."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from files import read_rows
from planning.tables import count, duration, table


@dataclass(frozen=True)
class Progress:
    """What the log of a run says; None: not said."""

    name: str
    step: int
    steps: int | None
    tokens: int
    seconds: float
    """of training, evaluations and pauses left out"""
    rate: float
    """tokens a second, the last that was logged"""
    mfu: float | None
    loss: float | None
    held_out: float | None
    """the lowest"""

    @property
    def left(self) -> float | None:
        """Seconds to the end, at the mean rate; None where the number of steps is not known."""
        return None if self.steps is None else self.seconds / self.step * max(0, self.steps - self.step)


def read(directory: Path) -> Progress:
    """Return the progress of a run. Raises FileNotFoundError or ValueError for a directory without a log."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"--run {directory} has no metrics.jsonl; expected the directory of a training run")
    rows = read_rows(path)
    rates = {row["step"]: row["tokens_per_second"] for row in rows if row.get("tokens_per_second")}
    tokens = {row["step"]: row["tokens"] for row in rows if row.get("tokens")}
    if not rates or not tokens:
        raise ValueError(f"--run {directory} has not logged a rate yet: wait for --train.log_interval steps")
    # each rate is that of the tokens since the row before
    seconds, before = 0.0, 0
    for step in sorted(set(rates) & set(tokens)):
        seconds += (tokens[step] - before) / rates[step]
        before = tokens[step]
    last = max(rates)
    mfu = {row["step"]: row["mfu"] for row in rows if "mfu" in row}
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    of_loss = losses[max(losses)] if losses else None
    total = steps_of(directory)
    numbers = (max(tokens), total, tokens[max(tokens)], seconds, rates[last], mfu.get(last), of_loss)
    return Progress(str(directory), *numbers, min(held_out, default=None))


def steps_of(directory: Path) -> int | None:
    """Return the steps of a whole run: those of its result, of its record, or of --train.max_steps; None where none of
    them says so."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((directory / "result.json").read_text(encoding="utf8"))["steps"])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((directory / "run.json").read_text(encoding="utf8"))["training"]["steps"])
    with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        whole = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf8"))
        for section in whole.values():
            return section["train"]["max_steps"] or None
    return None


def report(found: list[Progress], gpus: int, price: float | None) -> str:
    """Return runs side by side; price: of one device for an hour (None: no money is told)."""
    named: dict[str, Any] = {
        "steps": lambda run: f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
        "tokens": lambda run: count(run.tokens),
        "training time so far": lambda run: duration(run.seconds),
        "tokens/s, the last": lambda run: f"{run.rate:,.0f}",
        "tokens/s, the mean": lambda run: f"{run.tokens / run.seconds:,.0f}",
        "MFU, the last": lambda run: "-" if run.mfu is None else f"{run.mfu:.1%}",
        "time left": lambda run: "not known (--train.epochs)" if run.left is None else duration(run.left),
        "training loss": lambda run: "-" if run.loss is None else f"{run.loss:.4f}",
        "lowest held-out loss": lambda run: "-" if run.held_out is None else f"{run.held_out:.4f}",
    }
    if price is not None:
        named["cost so far"] = lambda run: f"{run.seconds / 3600 * gpus * price:,.2f}"
        named["cost to come"] = lambda run: "-" if run.left is None else f"{run.left / 3600 * gpus * price:,.2f}"
    return table(("", *(run.name for run in found)), [(name, *map(say, found)) for name, say in named.items()])

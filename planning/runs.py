"""What a run has done so far, from the files in its directory; without torch."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from checkpoint import config_json
from checkpoint.locate import model_in, read_config
from files import read_rows
from planning.tables import count, duration, table
from training.flops import train_flops_per_token


@dataclass(frozen=True)
class Progress:
    """What the log of a run says; None: not said."""

    name: str
    step: int
    steps: int | None
    tokens: int
    seconds: float
    """seconds of training, without evaluations and pauses"""
    rate: float
    """tokens a second, the last that was logged"""
    mfu: float | None
    """model flops utilisation, the last that was logged"""
    again: bool
    """whether blocks are recomputed, a third of the operations more, which MFU does not count and HFU does"""
    flops: float | None
    """operations of training for a token"""
    first_step: float
    """seconds of the first steps, which compile, of all starts"""
    paused: float | None
    """seconds of evaluations, checkpoints and samples; None in logs that do not say them"""
    loss: float | None
    held_out: float | None
    """lowest held-out loss"""

    @property
    def left(self) -> float | None:
        """Seconds to the end, at the mean rate; None where the number of steps is not known."""
        return None if self.steps is None else self.seconds / self.step * max(0, self.steps - self.step)

    @property
    def hfu(self) -> float | None:
        """Hardware flops utilisation, recomputation included."""
        return self.mfu and self.mfu * (4 / 3 if self.again else 1)

    @property
    def mean(self) -> float:
        """Tokens a second of all steps."""
        return self.tokens / self.seconds

    def predicted(self, efficiency: float) -> float | None:
        """Return the tokens a second of a plan in which products reach this share of the peak; None where the log has
        no MFU, which says what the peak is."""
        work = 4 / 3 if self.again else 1
        return self.rate / self.mfu * efficiency / work if self.mfu else None


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
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    pauses = [row["pause_seconds"] for row in rows if "pause_seconds" in row]
    settings = settings_of(directory)
    return Progress(
        name=str(directory),
        step=max(tokens),
        steps=steps_of(directory, settings),
        tokens=tokens[max(tokens)],
        seconds=seconds,
        rate=rates[last],
        mfu={row["step"]: row["mfu"] for row in rows if "mfu" in row}.get(last),
        again=bool(mapping(settings, "train").get("gradient_checkpointing")),
        flops=flops_of(directory, settings),
        first_step=sum(row["first_step"] for row in rows if "first_step" in row),
        paused=sum(pauses) if pauses else None,
        loss=losses[max(losses)] if losses else None,
        held_out=min((row["eval_loss"] for row in rows if "eval_loss" in row), default=None),
    )


def settings_of(directory: Path) -> dict[str, Any]:
    """Return the settings in a run's config.yaml; {} where they are missing or damaged."""
    with contextlib.suppress(OSError, ValueError, StopIteration, AttributeError, yaml.YAMLError):
        section = next(iter(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf8")).values()))
        return section if isinstance(section, dict) else {}
    return {}


def mapping(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the mapping under a name; {} where there is none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def flops_of(directory: Path, settings: dict[str, Any]) -> float | None:
    """Return the operations for a token of the model in a run's newest checkpoint; None before there is one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        args = config_json.read(read_config(model_in(directory)))
        return train_flops_per_token(args, int(mapping(settings, "data")["seq_len"]))
    return None


def steps_of(directory: Path, settings: dict[str, Any]) -> int | None:
    """Return the steps of a whole run: those of its result, of its record, or of --train.max_steps; None where none of
    them says so."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((directory / "result.json").read_text(encoding="utf8"))["steps"])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((directory / "run.json").read_text(encoding="utf8"))["training"]["steps"])
    return mapping(settings, "train").get("max_steps") or None


def report(found: list[Progress], gpus: int, price: float | None, efficiency: float) -> str:
    """Return runs side by side; price: of one device for an hour (None: no money is told); efficiency: share of the
    peak that a plan assumes."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    def loss(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    named: dict[str, Any] = {
        "steps": lambda run: f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
        "tokens": lambda run: count(run.tokens),
        "first steps, which compile": lambda run: duration(run.first_step),
        "steps so far": lambda run: duration(run.seconds),
        "evaluations and checkpoints": lambda run: "-" if run.paused is None else duration(run.paused),
        "time left": lambda run: "not known (--train.epochs)" if run.left is None else duration(run.left),
        "tokens/s, the last": lambda run: f"{run.rate:,.0f}",
        "tokens/s, the mean": lambda run: f"{run.mean:,.0f}",
        f"tokens/s of a plan (--mfu {efficiency:g})": lambda run: (
            "-" if (rate := run.predicted(efficiency)) is None else f"{rate:,.0f}, {run.rate / rate:.0%} reached"
        ),
        "TFLOP/s, the last": lambda run: "-" if run.flops is None else f"{run.rate * run.flops / 1e12:.3g}",
        "MFU, the last": lambda run: share(run.mfu),
        "HFU, the last": lambda run: share(run.hfu),
        "training loss": lambda run: loss(run.loss),
        "lowest held-out loss": lambda run: loss(run.held_out),
    }
    if price is not None:
        named["cost so far"] = lambda run: f"{run.seconds / 3600 * gpus * price:,.2f}"
        named["cost to come"] = lambda run: "-" if run.left is None else f"{run.left / 3600 * gpus * price:,.2f}"
    return table(("", *(run.name for run in found)), [(name, *map(say, found)) for name, say in named.items()])

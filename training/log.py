"""Log a run: console lines, `metrics.jsonl`, TensorBoard and other loggers, and a picture of the loss."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cli.progress import Progress, say
from files import read_rows
from training.loggers import Loggers
from training.state import TrainState


class RunLog:
    """The log of one run directory; all ranks but the main one pass `active=False`, which does nothing.

    A run that resumes after `first_step` removes the rows of later steps, so that `metrics.jsonl` reads as if there had
    been no interruption. `evaluated`: the last step whose evaluation the checkpoint knows; None: `first_step`.
    loggers: names of --train.loggers.
    """

    def __init__(
        self,
        directory: Path,
        first_step: int,
        total_steps: int,
        active: bool = True,
        evaluated: int | None = None,
        loggers: Sequence[str] = ("tensorboard",),
    ) -> None:
        self.active = active
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= first_step] if first_step else []
        # killed between the row of the last evaluation and its checkpoint: it is done again
        if first_step == total_steps and evaluated not in (None, first_step):
            kept = [row for row in kept if row["step"] < first_step or "eval_loss" not in row]
        aside = self.path.with_suffix(".writing")
        self.first_step, self.rows, self.sha256 = first_step, 0, hashlib.sha256()
        self.kept = [json.dumps(row) + "\n" for row in kept]
        aside.write_text("".join(self.kept))
        aside.replace(self.path)
        self._count("".join(self.kept), len(kept))
        self.file = self.path.open("a", buffering=1)
        self.loggers = Loggers(loggers, directory, first_step, kept)
        self.progress_bar = Progress("training", "step", total_steps, first_step, note_only=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row of `metrics.jsonl`, and give the same numbers to the loggers."""
        if self.active:
            line = json.dumps({"step": step, **values}) + "\n"
            self.file.write(line)
            self._count(line)
            self.loggers.write(step, values)

    def _count(self, text: str, rows: int = 1) -> None:
        self.rows += rows
        self.sha256.update(text.encode())

    def contents(self) -> list | None:
        """Return the number of rows and their SHA-256, for the checkpoint of this moment."""
        return [self.rows, self.sha256.hexdigest()] if self.active else None

    def compare(self, contents: list | None) -> None:
        """Say so when the rows up to the checkpoint of a resumed run are not its `contents`, as after damage."""
        if not self.active or contents is None or not self.first_step:
            return
        rows, sha256 = contents
        if hashlib.sha256("".join(self.kept[:rows]).encode()).hexdigest() != sha256:
            say(
                f"{self.path} is damaged: {len(self.kept)} of its {rows} rows up to step {self.first_step} can be "
                "read, and not all are what was written. Training does not depend on them, and goes on"
            )

    def say(self, text: str) -> None:
        if self.active:
            say(text)

    def progress(self, step: int, values: dict[str, str]) -> None:
        """Move the bar on a terminal; write one plain line elsewhere."""
        if self.active:
            self.progress_bar.show(step, " ".join(f"{name} {value}" for name, value in values.items()))

    def draw(self) -> None:
        """Draw `loss.png` anew."""
        if self.active:
            draw_losses({"": self.path}, self.path.with_name("loss.png"))

    def close(self) -> None:
        """Draw `loss.png` and close the files."""
        if self.active:
            self.progress_bar.close()
            self.file.close()
            self.loggers.close()
            self.draw()


class Clock:
    """Measure the rate since the last reading, and the time left.

    peak: operations a second that all devices of the run can do together.
    """

    def __init__(self, state: TrainState, total_steps: int, flops_per_token: float, peak: float) -> None:
        self.total_steps, self.flops_per_token, self.peak = total_steps, flops_per_token, peak
        self.step, self.tokens, self.time = state.step, state.tokens, time.perf_counter()
        self.away = 0.0  # seconds since the last reading in which nothing was trained

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block, of an evaluation for one, out of the rate."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.away += time.perf_counter() - before

    def restart(self, state: TrainState) -> float:
        """Measure from here on; return the seconds since the last reading."""
        before = self.time
        self.step, self.tokens, self.time, self.away = state.step, state.tokens, time.perf_counter(), 0.0
        return self.time - before

    def read(self, state: TrainState) -> tuple[float, float, float]:
        """Return tokens a second, seconds left and model flops utilisation, of the steps since the last call. Pauses
        count for the time left only."""
        now = time.perf_counter()
        seconds, steps, tokens = now - self.time, state.step - self.step, state.tokens - self.tokens
        rate = tokens / max(1e-9, seconds - self.away)
        self.step, self.tokens, self.time, self.away = state.step, state.tokens, now, 0.0
        return rate, seconds / max(1, steps) * (self.total_steps - state.step), rate * self.flops_per_token / self.peak


def summary(result: dict[str, Any]) -> str:
    """Return what `Trainer.fit` returned as one line: where the best model lies, and how good it is."""
    metrics = {name: value for name, value in result.items() if name not in ("steps", "tokens", "model")}
    best = f"Best checkpoint: {result['model']}; on all held-out data: {format_metrics(metrics)}."
    last = f"Model: {result['model']} (no held-out data to compare on)."
    return f"Finished after {result['steps']:,} steps. {best if metrics else last}"


def format_metrics(metrics: dict[str, float]) -> str:
    """Return metrics as one line, `loss 4.4594 (standard error 0.0123), bits per byte 2.0841`; loss/NAME stays."""
    shown = {name: f"{value:.4f}" for name, value in metrics.items() if name != "loss_error"}
    if "loss_error" in metrics:
        shown["loss"] += f" (standard error {metrics['loss_error']:.4f})"
    return ", ".join(f"{name if '/' in name else name.replace('_', ' ')} {value}" for name, value in shown.items())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, without damaged lines; [] where there is no file."""
    return read_rows(path)


def draw_losses(runs: dict[str, Path], picture: Path) -> None:
    """Draw the training and held-out losses of one or more runs (label -> metrics.jsonl) against steps, as a PNG."""
    from matplotlib.figure import Figure  # takes a third of a second to import, and is needed once a run

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, path in runs.items():
        rows = read_metrics(path)
        (line,) = axes.plot(*_series(rows, "loss"), lw=1, alpha=0.5, label=f"{label} training".strip())
        axes.plot(*_series(rows, "eval_loss"), "o-", ms=3, color=line.get_color(), label=f"{label} held out".strip())
    axes.set(xlabel="optimizer step", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def _series(rows: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in pairs], [value for _, value in pairs]

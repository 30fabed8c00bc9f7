"""What a run leaves to be read: console lines, `metrics.jsonl`, TensorBoard events and a picture of the loss."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from cli.progress import Progress, say


class RunLog:
    """The log of one run directory. Rank 0 alone should own one; the other ranks pass `active=False`.

    A run that resumes at `first_step` forgets what an interrupted one had logged of that step and later, so that
    `metrics.jsonl` reads as if there had been no interruption.
    """

    def __init__(self, directory: Path, first_step: int, total_steps: int, active: bool = True) -> None:
        self.active = active
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= first_step] if first_step else []
        aside = self.path.with_suffix(".writing")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        aside.replace(self.path)
        self.file = self.path.open("a", buffering=1)
        self.board = SummaryWriter(directory / "tensorboard", purge_step=first_step + 1)
        self.shown = Progress("training", "step", total_steps, first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row of `metrics.jsonl`, and the same numbers to TensorBoard."""
        if self.active:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """One line for the person who waits: above the bar on a terminal, plain otherwise."""
        if self.active:
            say(text)

    def progress(self, step: int, values: dict[str, str]) -> None:
        """Move the bar on a terminal; print one plain line elsewhere."""
        if self.active:
            self.shown.show(step, " ".join(f"{name} {value}" for name, value in values.items()))

    def close(self) -> None:
        """Draw `loss.png` and close the files."""
        if self.active:
            self.shown.close()
            self.file.close()
            self.board.close()
            draw_losses({"": self.path}, self.path.with_name("loss.png"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_losses(runs: dict[str, Path], picture: Path) -> None:
    """Loss against steps of one or more runs (label -> metrics.jsonl), training and held out, as a PNG."""
    from matplotlib.figure import Figure  # a third of a second to import, wanted once a run

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

"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, SwanLab, behind one interface.

A logger is an extra: one that fails, because there is no network for one, is named once and left out, and the run goes
on. What a logger does is set by its own environment variables: WANDB_MODE=offline, WANDB_PROJECT, SWANLAB_MODE=offline.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch.utils.tensorboard import SummaryWriter

from cli.progress import say
from files import read_json, write_json

PROJECT = "little-llama"  # where the environment names no other one
IDS = "loggers.json"  # in the run directory: the names under which sites know the run, so that it goes on there


class Logger(Protocol):
    """A place for the numbers of a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Store the values of a step; a step may come several times, with other names."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Events for TensorBoard, in a folder of the run directory; see `open_board`."""

    def __init__(self, directory: Path, first_step: int, kept: Sequence[dict]) -> None:
        self.board = open_board(directory / "tensorboard", first_step, kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class WandB:
    """A run of Weights & Biases; with WANDB_MODE=offline a folder in the run directory, for `wandb sync`."""

    def __init__(self, directory: Path, first_step: int, kept: Sequence[dict]) -> None:
        wandb = importlib.import_module("wandb")
        fresh = uuid.uuid4().hex[:12]
        name = known_as("wandb", directory, fresh, first_step)
        options: dict[str, Any] = {"id": name, "resume": "allow", "dir": str(directory), "config": settings(directory)}
        # never a question on the terminal: a run in the background would wait for ever
        options["settings"] = wandb.Settings(silent=True, init_timeout=60, console="off", disable_git=True)
        self.run = wandb.init(project=project("WANDB_PROJECT"), name=title(directory), **options)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    """An experiment of SwanLab; with SWANLAB_MODE=offline or local a folder in the run directory."""

    def __init__(self, directory: Path, first_step: int, kept: Sequence[dict]) -> None:
        swanlab = importlib.import_module("swanlab")
        name = known_as("swanlab", directory, uuid.uuid4().hex[:20] + "0", first_step)
        options = {"id": name, "resume": "allow", "logdir": str(directory / "swanlab"), "config": settings(directory)}
        self.run = swanlab.init(project=project("SWANLAB_PROJECT"), experiment_name=title(directory), **options)
        self.finish = swanlab.finish

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.finish()


LOGGERS: dict[str, Callable[[Path, int, Sequence[dict]], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "swanlab": SwanLab,
}


class Loggers:
    """Several loggers as one; one that fails is named and left out from then on."""

    def __init__(self, names: Sequence[str], directory: Path, first_step: int, kept: Sequence[dict]) -> None:
        self.open: dict[str, Logger] = {}
        for name in names:
            with self._guarded(name):
                self.open[name] = LOGGERS[name](directory, first_step, kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Give the values of a step to every logger that has not failed."""
        for name, logger in list(self.open.items()):
            with self._guarded(name):
                logger.write(step, values)

    def close(self) -> None:
        """Close all loggers."""
        for name, logger in list(self.open.items()):
            with self._guarded(name):
                logger.close()
        self.open.clear()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a package or its site raises: a run must not end by it
            self.open.pop(name, None)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            say(f"--train.loggers {name} has failed and is left out from here on; the run goes on: {lines[0]}")


def known_as(logger: str, directory: Path, fresh: str, first_step: int) -> str:
    """Return the name by which the site of a logger knows a run that goes on; of a new one `fresh`, which is kept."""
    try:
        names = read_json(directory / IDS) or {}
    except ValueError:
        names = {}
    if not first_step or not isinstance(names.get(logger), str):
        names[logger] = fresh
        write_json(directory / IDS, names)
    return names[logger]


def project(variable: str) -> str:
    """Return the project that the environment names."""
    return os.environ.get(variable) or PROJECT


def title(directory: Path) -> str:
    """Return the last two parts of the path of a run, such as tiny-sft."""
    return "-".join(directory.resolve().parts[-2:])


def settings(directory: Path) -> dict[str, Any]:
    """Return the config.yaml of a run; {} where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        return dict(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf8")))
    return {}


def open_board(directory: Path, first_step: int, kept: Sequence[dict]) -> SummaryWriter:
    """Return a writer of TensorBoard events; what older files have of steps after `first_step` is not shown any more.

    TensorBoard reads the files in the order of the seconds in their names. Where that is not the order in which they
    were written, since the clock was set back or a second has not passed, they are replaced by the rows in `kept`.
    """
    older = sorted(directory.glob("events.out.tfevents.*"))
    seconds = [path.name.split(".")[3] for path in older]
    if all(each.isdigit() and int(each) < int(time.time()) for each in seconds):
        return SummaryWriter(directory, purge_step=first_step + 1)
    for path in older:
        path.unlink()
    board = SummaryWriter(directory)
    for row in kept:
        for name, value in row.items():
            if name != "step":
                board.add_scalar(name, value, row["step"])
    return board

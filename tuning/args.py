"""The flags of fine-tuning: data, mixtures of tasks, preferences. Free of torch, as model_args.py is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

Packing = Literal["best_fit", "concat", "bucket", "none"]


@dataclass(frozen=True)
class DataArgs:
    """Conversations and batches."""

    train: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["--data"])] = (Path("data/tiny/sft_train.jsonl"),)
    """conversations in any of the usual forms (json, jsonl, csv, tsv, parquet, a folder of them, a loader in Python);
    several paths, or one with commas, are several tasks"""
    heldout: tuple[Path, ...] = ()
    """conversations to evaluate on, for each task; none: heldout_share of train; of one task a missing file: no
    evaluation"""
    heldout_share: float = 0.02
    """the share of train to evaluate on and not to train, by the hash of the question; 0: no evaluation"""
    template: str = "auto"
    """auto (the model's own, else ours), own, ours, plain, chatml, llama2, mftcoder, or the path of a .jinja file"""
    train_on: Literal["all", "last"] = "all"
    """the answers of a conversation that are trained; one with "loss": false in its record never is"""
    seq_len: int = 128
    """tokens in a row of a batch; of pairs, in each of the two texts"""
    batch_size: int = 64
    """rows of an optimizer step, over all processes and micro-batches"""
    packing: Packing = "best_fit"
    """best_fit: several samples a row, hidden from each other; concat: one after another, cut where a row ends; bucket:
    one a row, padded to the longest of a step of about equal ones; none: likewise of any"""
    too_long: Literal["cut", "drop"] = "cut"
    """what happens to a sample that does not fit a row (concat takes it whole)"""
    loss: Loss = "token"
    """a step's mean over its targets (token), samples, tasks by target (task_token) or by sample (task_sample), which
    are MFTCoder's case1, 2, 3 and 4 over the whole step; coba: task_token, its weights by how each task converges"""
    weights: tuple[float, ...] = ()
    """of the tasks, for task_token and task_sample; none: equal ones"""
    temperature: float = 1.0
    """small tasks are seen more often: samples of one of n are taken in proportion to n^(1/temperature)"""
    coba_interval: int = 1
    """steps between CoBa's measures, each on one held-out batch, which take turns"""
    coba_warmup: int = 100
    """measures before the weights begin to change"""
    coba_history: int = 200
    """measures that a slope is fitted to"""
    coba_tau: float = 5.0
    """how sharply CoBa turns to tasks that diverge"""

    def __post_init__(self) -> None:
        """Raises ValueError on numbers out of range, on what a task lacks, and on what would do nothing."""
        n_tasks = len(split_paths(self.train))
        self._check_heldout(n_tasks)
        if not self.temperature >= 1:
            raise ValueError(f"--data.temperature should be 1 (no upsampling) or more, found {self.temperature}")
        if self.temperature != 1 and n_tasks == 1:
            raise ValueError("--data.temperature would do nothing: it is of several tasks, and --data names one")
        if self.weights and self.loss not in ("task_token", "task_sample"):
            raise ValueError(
                f"--data.weights are of tasks: they go with --data.loss task_token or task_sample, not {self.loss}"
            )
        if (w := self.weights) and not (len(w) == n_tasks and min(w) >= 0 and 0 < sum(w) < math.inf):
            found = " ".join(map(str, w))
            raise ValueError(
                f"--data.weights should be {n_tasks} numbers of 0 or more, not all of them 0, found {found}"
            )
        of_coba = [field for field in fields(self) if field.name.startswith("coba_")]
        idle = [f"--data.{field.name}" for field in of_coba if getattr(self, field.name) != field.default]
        if idle and self.loss != "coba":
            raise ValueError(f"{', '.join(idle)} would do nothing: --data.loss is {self.loss}, not coba")

    def _check_heldout(self, n_tasks: int) -> None:
        heldout = split_paths(self.heldout)
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"--data.heldout_share should be from 0 to below 1, found {self.heldout_share}")
        if heldout and len(heldout) != n_tasks:
            raise ValueError(f"--data.heldout should name one path for each of {n_tasks} tasks, found {len(heldout)}")
        missing = ", ".join(str(path) for path in heldout if not path.exists())
        if missing and n_tasks > 1:
            raise ValueError(f"--data.heldout names one path for each of {n_tasks} tasks, and there is no {missing}")


Loss = Literal["token", "sample", "task_token", "task_sample", "coba"]


def split_paths(paths: Sequence[Path]) -> list[Path]:
    """Paths with those written as one, `dirA,dirB`, taken apart; one that exists with its comma stays whole."""
    return [Path(part) for path in paths for part in ([path] if path.exists() else str(path).split(",")) if str(part)]


def task_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: of its folder or file, without a suffix; of two with the same one, the whole path.

    Raises ValueError where a path comes twice."""
    if len(set(paths)) < len(paths):
        raise ValueError(f"each task should be named once, found {', '.join(map(str, paths))}")
    names = [path.name if path.is_dir() else path.stem for path in paths]
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names)]


@dataclass(frozen=True)
class PreferenceArgs:
    """What is learnt from pairs of answers."""

    beta: float = 0.1
    """DPO: how dearly distance from the reference is paid (less of it lets the model go further); ORPO: the weight of
    the odds ratio beside the loss on the chosen answer (lambda in its paper)"""
    label_smoothing: float = 0.0
    """DPO: the share of pairs that are taken to be the wrong way round (conservative DPO)"""
    sft_weight: float = 0.0
    """DPO: the weight of the chosen answer's own loss a token, which keeps it from becoming less probable"""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta should be above 0, and finite, found {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing should be from 0 to below 0.5, where no answer is preferred any more, "
                f"found {self.label_smoothing}"
            )
        if not 0 <= self.sft_weight < math.inf:
            raise ValueError(f"sft_weight should be 0 or more, and finite, found {self.sft_weight}")

"""The flags of fine-tuning: data, mixtures of tasks, objectives. Free of torch, as model_args.py is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from cli.flags import ABOVE_0, Needs
from lora.spec import METHODS
from training.args import NEEDS as TRAINING_NEEDS

Packing = Literal["best_fit", "concat", "bucket", "none"]
Loss = Literal["token", "sample", "task_token", "task_sample", "coba"]

OBJECTIVES: dict[str, tuple[str, ...]] = {  # name -> its settings in PreferenceArgs; the classes: objectives.py
    "sft": (),
    "dpo": ("beta", "label_smoothing", "sft_weight"),
    "orpo": ("beta",),
}
ObjectiveName = Literal[tuple(OBJECTIVES)]


class Task(NamedTuple):
    """One of the tasks of a run."""

    name: str
    path: Path  # file or folder of the records to train on
    heldout: Path | None  # file or folder of the records to evaluate on; None: a share of those at `path`
    weight: float  # how much the task counts in the loss, relative to the others


@dataclass(frozen=True)
class DataArgs:
    """Conversations and batches."""

    train: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["--data"])] = (Path("data/tiny/sft_train.jsonl"),)
    """conversations or pairs of answers in any usual form: json, jsonl, csv, tsv, parquet, a folder of such files, or a
    loader in Python; several paths, separated by spaces or commas, are several tasks"""
    heldout: tuple[Path, ...] = ()
    """data to evaluate on, one path for each task; without it, heldout_share of --data. With one task the file may be
    missing: then nothing is evaluated"""
    heldout_share: float = 0.02
    """share of --data that is evaluated on instead of trained, chosen by the hash of the question; 0: no evaluation"""
    template: str = "auto"
    """chat template. auto: the model's own if it has one, else ours; or own, ours, plain, chatml, llama2, mftcoder, or
    the path of a .jinja file"""
    train_on: Literal["all", "last"] = "all"
    """all: train every answer of a conversation; last: only the last one. An answer with "loss": false in its record is
    never trained"""
    seq_len: Annotated[int, (1, 2147483647)] = 128
    """tokens in one row of a batch; for pairs, in each of the two texts"""
    batch_size: Annotated[int, (1, 10000000)] = 64
    """rows in one optimizer step, summed over all processes and micro-batches"""
    packing: Packing = "best_fit"
    """best_fit: fill each row with whole samples that cannot see each other; concat: join all samples and cut every
    seq_len tokens; bucket: one sample a row, samples of similar length in one batch, padded; none: one sample a row,
    any lengths, padded"""
    too_long: Literal["cut", "drop"] = "cut"
    """what happens to a sample that is longer than a row: cut its end, or drop it (concat always keeps all of it)"""
    loss: Loss = "token"
    """how losses are averaged in a step. token: every trained token counts the same; sample: every conversation;
    task_token, task_sample: every task, averaging tokens or conversations within it; coba: like task_token, with
    weights that adapt to how fast each task converges (CoBa). The first four are MFTCoder's cases 1 to 4"""
    weights: tuple[float, ...] = ()
    """one weight for each task, with --data.loss task_token or task_sample; without it all tasks weigh the same"""
    temperature: Annotated[float, (1, 1000)] = 1.0
    """above 1, small tasks are repeated: a task of n samples is seen in proportion to n^(1/temperature)"""
    coba_interval: int = 1
    """CoBa: steps between two measurements of the held-out losses, each on one batch, one batch after another"""
    coba_warmup: int = 100
    """CoBa: measurements before the weights begin to change"""
    coba_history: int = 200
    """CoBa: number of the last measurements that the slope of a task's loss is fitted to"""
    coba_tau: Annotated[float, (1e-6, 1000)] = 5.0
    """CoBa: how strongly the weights react when a task diverges"""

    def __post_init__(self) -> None:
        """Raise ValueError on a number out of range, and where there is not one path or weight for each task."""
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"--data.heldout_share should be from 0 to below 1, found {self.heldout_share}")
        if not self.temperature >= 1:
            raise ValueError(f"--data.temperature should be 1 (no upsampling) or more, found {self.temperature}")
        n_tasks, heldout = len(split_paths(self.train)), split_paths(self.heldout)
        if not n_tasks:
            raise ValueError("--data.train should name a file or folder for each task, found nothing")
        if self.temperature != 1 and n_tasks == 1:
            raise ValueError("--data.temperature needs several tasks, found one path in --data: remove it")
        if heldout and len(heldout) != n_tasks:
            raise ValueError(f"--data.heldout should name one path for each of {n_tasks} tasks, found {len(heldout)}")
        missing = ", ".join(str(path) for path in heldout if not path.exists())
        if missing and n_tasks > 1:
            raise ValueError(f"--data.heldout should name one path for each of {n_tasks} tasks; there is no {missing}")
        if (w := self.weights) and not (len(w) == n_tasks and min(w) >= 0 and 0 < sum(w) < math.inf):
            found = " ".join(map(str, w))
            raise ValueError(
                f"--data.weights should be {n_tasks} numbers of 0 or more, not all of them 0, found {found}"
            )

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks of --data. Raises ValueError where a path comes twice."""
        paths, heldout = split_paths(self.train), split_paths(self.heldout)
        none = [None] * len(paths)
        return list(map(Task, task_names(paths), paths, heldout or none, self.weights or [1.0] * len(paths)))


def split_paths(paths: Sequence[Path]) -> list[Path]:
    """Split paths that are written as one, `dirA,dirB`; a path that exists with its comma stays whole."""
    return [Path(part) for path in paths for part in ([path] if path.exists() else str(path).split(",")) if str(part)]


def task_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: that of its folder, or of its file without the suffix; where two are the same, the
    whole path. Raises ValueError where a path comes twice."""
    if len(set(paths)) < len(paths):
        raise ValueError(f"--data should name each task once, found {', '.join(map(str, paths))}")
    names = [path.name if path.is_dir() else path.stem for path in paths]
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names)]


@dataclass(frozen=True)
class PreferenceArgs:
    """Settings of the objectives that learn from pairs of answers."""

    beta: Annotated[float, (1e-6, 1000)] = 0.1
    """DPO: how strongly the model is held near the reference (less lets it move further away); ORPO: weight of the odds
    ratio beside the loss on the chosen answer (lambda in the paper)"""
    label_smoothing: float = 0.0
    """DPO: share of the pairs that are assumed to be labelled the wrong way round (conservative DPO)"""
    sft_weight: Annotated[float, (0, 1000)] = 0.0
    """DPO: weight of the chosen answer's own loss per token, which keeps that answer from becoming less probable"""

    def __post_init__(self) -> None:
        """Raise ValueError on a number out of range."""
        if not 0 < self.beta < math.inf:
            raise ValueError(f"--preference.beta should be above 0, and finite, found {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"--preference.label_smoothing should be from 0 to below 0.5 (at 0.5 no answer is preferred), "
                f"found {self.label_smoothing}"
            )
        if not 0 <= self.sft_weight < math.inf:
            raise ValueError(f"--preference.sft_weight should be 0 or more, and finite, found {self.sft_weight}")


def several(paths: Sequence[Path]) -> bool:
    """Return whether a flag names more than one path."""
    return len(split_paths(paths)) > 1


def cannot_hold_pairs(packing: str) -> bool:
    """Return whether a way of packing takes conversations only."""
    return packing not in ("best_fit", "none")


NEW_TOKENS = (
    "new tokens change the model that an adapter belongs to. Make that model first, with python convert.py tokens "
    "--model {args.init_from} --out DIR, and adapt it with --init_from DIR"
)
NOT_EVALUATED = "without held-out data nothing is evaluated; remove it, or hold some out"
NEEDS = (
    *TRAINING_NEEDS,
    Needs("check", "show", (0,), "--show prints samples and looks at nothing else; keep one"),
    *(
        Needs(f"train.{name}", other, values, why)
        for name in ("tp", "pp")
        for other, values, why in (
            ("lora.method", ("none",), "adapters are not divided, and are small: use --train.backend fsdp alone"),
            ("objective", ("sft",), "pairs of answers are compared by one process: use --train.backend fsdp alone"),
            ("neftune_alpha", (0.0,), "its noise is drawn for the whole embedding; remove it"),
        )
    ),
    Needs("check", "train.backend", ("single",), "one process looks at a run; remove it for the check"),
    Needs(
        "lora.*",
        "lora.method",
        tuple(METHODS),
        "only adapters have this setting, and without a method all weights are trained; choose a method, or remove it",
        if_named=("lora.r", "lora.alpha", "lora.dropout", "lora.targets"),
    ),
    Needs(
        "lora.base",
        "lora.method",
        ("none", *(name for name in METHODS if name != "pissa")),
        "pissa changes the base weights, and quantized weights are frozen",
    ),
    Needs("lora.double_quant", "lora.base", ("nf4", "fp4"), "it quantizes their scales; remove it"),
    Needs("add_tokens", "lora.method", ("none",), NEW_TOKENS),
    Needs("add_special_tokens", "lora.method", ("none",), NEW_TOKENS),
    Needs(
        "data.weights", "data.loss", ("task_token", "task_sample"), "the other losses have no fixed weights; remove it"
    ),
    Needs("data.coba_*", "data.loss", ("coba",), "these are settings of CoBa; remove them"),
    *(
        Needs(
            f"preference.{setting.name}",
            "objective",
            tuple(name for name, settings in OBJECTIVES.items() if setting.name in settings),
            "no other objective has this setting; remove it",
        )
        for setting in fields(PreferenceArgs)
    ),
    Needs("optim.muon_lr", "lora.method", ("none",), "AdamW trains adapters, at --optim.lr; remove it"),
    Needs("optim.momentum", "lora.method", ("none",), "AdamW trains adapters, with --optim.betas; remove it"),
    Needs("optim.lora_lr_ratio", "lora.method", tuple(METHODS), "only adapters have a lora_B; remove it"),
    Needs("data.heldout_share", "data.heldout", ((),), "all of --data is trained where other files are evaluated on"),
    Needs("data.too_long", "data.packing", ("best_fit", "bucket", "none"), "concat keeps all of it; remove it"),
    *(
        Needs(f"train.{name}", "data.heldout_share", ABOVE_0, NOT_EVALUATED)
        for name in ("patience", "eval_interval", "eval_batches")
    ),
    Needs("data.train", "objective", ("sft",), "preference objectives train one task; name one path", several),
    Needs("data.loss", "objective", ("sft",), "preference objectives have losses of their own; remove it"),
    Needs("data.train_on", "objective", ("sft",), "preference objectives always train the last answer; remove it"),
    Needs("data.packing", "objective", ("sft",), "pairs are packed best_fit or none", cannot_hold_pairs),
    Needs("train.s2_group", "objective", ("sft",), "preference objectives attend in full; remove it"),
    Needs("train.metric", "objective", ("sft",), "with preference objectives the least loss is the best; remove it"),
)

"""The data of a fine-tuning run: files of conversations, or of pairs of answers -> what is trained and what is held out
of each task -> the batches of the loop, and what is told of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from chat.pairs import encode_pairs, read_pairs
from chat.samples import Samples, encode_samples, read_samples
from chat.template import ChatTemplate
from corpora import BadRecord
from dataset import BatchSource
from dataset_sft import Packing, PairData, SFTData
from tuning import mixture

ANY_LENGTH = 2**31  # tokens: longer than any sample


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
    loss: mixture.Loss = "token"
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
        n_tasks = len(mixture.split_paths(self.train))
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
        heldout = mixture.split_paths(self.heldout)
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"--data.heldout_share should be from 0 to below 1, found {self.heldout_share}")
        if heldout and len(heldout) != n_tasks:
            raise ValueError(f"--data.heldout should name one path for each of {n_tasks} tasks, found {len(heldout)}")
        missing = ", ".join(str(path) for path in heldout if not path.exists())
        if missing and n_tasks > 1:
            raise ValueError(f"--data.heldout names one path for each of {n_tasks} tasks, and there is no {missing}")


def read_data(
    data: DataArgs, paths: list[Path], template: ChatTemplate, broken: dict[Path, list[BadRecord]], in_pairs: bool
) -> tuple[list[Samples], list[Samples] | None]:
    """What is trained and what is held out of each task, None if nothing is; the records that are none go to `broken`,
    by file."""
    options = {"template": template, "too_long": data.too_long} | ({} if in_pairs else {"train_on": data.train_on})
    read = partial(read_pairs if in_pairs else read_samples, **options)
    encode = partial(encode_pairs if in_pairs else encode_samples, seq_len=data.seq_len, **options)
    given = mixture.split_paths(data.heldout)
    share = 0.0 if given else data.heldout_share
    seq_len = ANY_LENGTH if data.packing == "concat" else data.seq_len
    trained, heldout = [], []
    for path in paths:
        aside: list = []
        trained.append(read(path, seq_len=seq_len, broken=broken.setdefault(path, []), share=share, aside=aside))
        heldout.append(encode(aside))
    if given and all(path.exists() for path in given):
        heldout = [read(path, seq_len=data.seq_len, broken=broken.setdefault(path, [])) for path in given]
    return trained, heldout if any(map(len, heldout)) else None


def batches(
    args: DataArgs, seed: int, trained: list[Samples], heldout: list[Samples] | None
) -> tuple[BatchSource, SFTData | None]:
    """What the loop trains on, weighed as asked, and what it evaluates on."""
    samples, groups = mixture.join(trained, args.temperature, seed)
    per_sample = args.loss in ("sample", "task_sample")
    shape = (args.seq_len, args.batch_size)
    data = SFTData(
        samples, *shape, seed, args.packing, groups=groups if len(trained) > 1 else None, per_sample=per_sample
    )
    source: BatchSource = data
    if args.loss != "token":
        weights = None if args.loss == "sample" else args.weights or [1.0] * len(trained)
        source = mixture.Weighted(data, weights)
    if heldout is None:
        return source, None
    whole: Packing = "best_fit" if args.packing == "concat" else args.packing  # no answer is judged by its second half
    samples, groups = mixture.join(heldout)
    several = len(heldout) > 1  # then shuffled, so that the first batches hold something of each
    return source, SFTData(samples, *shape, 0, whole, shuffle=several, groups=groups if several else None)


def pair_batches(
    args: DataArgs, seed: int, trained: list[Samples], heldout: list[Samples] | None
) -> tuple[PairData, PairData | None]:
    """What the loop trains on and what it evaluates on, of pairs, which are numbered through."""
    shape = (args.seq_len, args.batch_size)
    data = PairData(*trained, *shape, seed, args.packing)
    if heldout is None:
        return data, None
    return data, PairData(*heldout, *shape, 0, args.packing, shuffle=False, first=data.n_pairs)


def keep_aside(path: Path, broken: list[BadRecord], aside: Path) -> None:
    """Write the broken records of `path`, if there are any, into the file `aside`, and say so."""
    if broken:
        aside.write_text("".join(json.dumps(vars(record), ensure_ascii=False) + "\n" for record in broken), "utf8")
        print(f"{path}: {len(broken)} broken records kept aside in {aside}; the first: {broken[0].reason}", flush=True)


def describe(
    args: DataArgs, paths: list[Path], trained: list[Samples], heldout: list[Samples] | None, data: BatchSource
) -> str:
    """Lines that tell what is trained, how full the batches are, and on what the model is evaluated."""
    lines = [
        f"{path}: " + ", ".join(f"{name} {number}" for name, number in samples.stats.items())
        for path, samples in zip(paths, trained)
    ]
    rows = getattr(data, "source", data)  # what it is before it is weighed
    share = rows.samples.mask.sum() / (np.diff(rows.samples.offsets.astype(np.int64)) - 1).sum()
    filled = rows.packing_efficiency
    lines[-1] += f"; {filled:.1%} of the positions hold samples, {filled * share:.1%} have a target"
    lines += [told for path, samples in zip(paths, trained) if (told := too_long(path, samples, args.seq_len))]
    if heldout is None:
        why = f"there is no {', '.join(map(str, args.heldout))}" if args.heldout else "no conversation is held out"
        return "\n".join([*lines, f"{why}: nothing is evaluated on the way"])
    shared = f"{args.heldout_share:.0%} of {', '.join(map(str, paths))}, by the hash of their questions"
    source = ", ".join(map(str, args.heldout)) or shared
    counts = " + ".join(str(len(samples)) for samples in heldout)
    what = f"{len(heldout[0]) // 2} pairs" if isinstance(data, PairData) else f"{counts} samples"
    return "\n".join([*lines, f"held out to evaluate on: {what} ({source})"])


def too_long(path: Path, samples: Samples, seq_len: int) -> str:
    """What rows of seq_len tokens leave out of a file, and what to do about it; nothing if they hold all of it."""
    stats = samples.stats
    fates = {
        "lose their end": stats["cut"],
        "are dropped (--data.too_long cut keeps their beginning)": stats["dropped"],
        "are left out since their answers lie beyond": stats["beyond"],
    }
    if not (lost := sum(fates.values())):
        return ""
    share = lost / (stats.get("pairs") or stats["conversations"])
    told = ", ".join(f"{number} {fate}" for fate, number in fates.items() if number)
    return (
        f"{path}: of {share:.0%} of the records something is not trained, "
        f"since rows are {seq_len} tokens long: {told}; --data.seq_len {samples.enough} would hold nine in ten whole"
    )

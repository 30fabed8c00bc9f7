"""The data of a fine-tuning run: files of records -> the samples of each task, to train on and to evaluate on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chat.samples import Kind, Record, Samples, collect, read_samples
from chat.template import ChatTemplate
from cli.progress import say
from corpora import BadRecord
from files import write_json_lines
from tuning.args import DataArgs, task_names

ANY_LENGTH = 2**31  # tokens: longer than any sample


@dataclass(frozen=True)
class Split:
    """Samples of a run, in the order of its tasks, records that could not be read, and what is not used of others."""

    trained: list[Samples]
    heldout: list[Samples] | None  # None: no task has any
    broken: dict[Path, list[BadRecord]]  # by the file or folder that they come from
    left_out: dict[Path, Counter[str]]  # number of records of which something is not used, by what that is


def read_split(data: DataArgs, kind: Kind, template: ChatTemplate) -> Split:
    """Read and encode the records of every task of `data`.

    A task without a held-out file of its own gives up a share of its records. With packing "concat" only training takes
    samples that are longer than a row.
    """
    options = {"template": template, "too_long": data.too_long, "train_on": data.train_on, "kind": kind}
    seq_len = ANY_LENGTH if data.packing == "concat" else data.seq_len
    trained, heldout, broken, left_out = [], [], {}, {}
    for task in data.tasks:
        aside: list[Record] = []
        share = data.heldout_share if task.heldout is None else 0.0

        def notes(path: Path) -> dict[str, Any]:
            return {"broken": broken.setdefault(path, []), "left_out": left_out.setdefault(path, Counter())}

        trained.append(
            read_samples(task.path, seq_len=seq_len, share=share, aside=aside, **notes(task.path), **options)
        )
        if task.heldout is not None and task.heldout.exists():
            heldout.append(read_samples(task.heldout, seq_len=data.seq_len, **notes(task.heldout), **options))
        else:
            heldout.append(collect(aside, kind, data.seq_len, data.too_long))
    return Split(trained, heldout if any(map(len, heldout)) else None, broken, left_out)


def check_heldout(data: DataArgs, metric: str, heldout: list[Samples] | None) -> str:
    """Return a sentence that names the tasks without a held-out sample, "" where every task has one.

    Raises ValueError where `metric`, which chooses the best checkpoint, or CoBa needs the samples that are missing.
    """
    names = [task.name for task in data.tasks]
    if heldout is None and metric != "loss":
        raise ValueError(f"--train.metric {metric} needs held-out data, and nothing is held out: set --data.heldout")
    if data.loss == "coba" and (heldout is None or len(names) < 2):
        raise ValueError(
            "--data.loss coba needs two tasks and held-out data, because it balances tasks by their held-out losses"
        )
    without = [name for name, samples in zip(names, heldout or []) if not len(samples)]
    if not without:
        return ""
    missing = f"no sample of {', '.join(without)} is held out"
    if data.loss == "coba" or metric in [f"loss/{name}" for name in without]:
        flag = "--data.loss coba" if data.loss == "coba" else f"--train.metric {metric}"
        raise ValueError(
            f"{flag} needs held-out samples of every task that it measures, and {missing}: "
            "raise --data.heldout_share, or name files with --data.heldout"
        )
    return f"{missing}: measurements during training leave it out; raise --data.heldout_share to measure it, too"


def keep_aside(broken: dict[Path, list[BadRecord]], run: Path) -> None:
    """Write the broken records of each path, if there are any, to a file in the directory `run`, and say so."""
    for (path, records), name in zip(broken.items(), task_names(list(broken))):
        if records:
            aside = run / f"broken_{name.replace('/', '_')}.jsonl"
            write_json_lines(aside, map(vars, records))
            count = "1 broken record is" if len(records) == 1 else f"{len(records):,} broken records are"
            say(f"{path}: {count} kept aside in {aside}; the first: {records[0].reason}")

"""What a fine-tuning run tells about its data: sentences on what is trained, and samples with their targets marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chat.samples import Kind, Samples
from chat.show import marked
from dataset import BatchSource
from tokenizer import Tokenizer
from tuning.args import DataArgs
from tuning.data import Split

# The mean loss of n conversations is known to 1.96 / sqrt(n) of the standard deviation between them (95 %): to 0.36 of
# it for 30. That deviation was 1.4 nats a token for 250 answers of alpaca_en_demo and a model of 260 K parameters.
ENOUGH_HELD_OUT = 30


def describe(data: DataArgs, split: Split, kind: Kind, batches: BatchSource, longest: int) -> str:
    """Return lines that say what is trained, what the rows leave out, and on what the model is evaluated.

    `longest` is the number of positions that the model has (max_seq_len).
    """
    lines = [f"{task.path}: {counts(samples, kind.records)}" for task, samples in zip(data.tasks, split.trained)]
    filler = "Packing" if data.packing in ("best_fit", "concat") else "Padding"
    waste = f"{filler} wastes {1 - batches.packing_efficiency:.1%} of each batch.".replace("%", " %")
    lines = [f"{lines[0]} {waste}"] if len(lines) == 1 else [*lines, waste]
    for task, samples in zip(data.tasks, split.trained):
        lines.append(too_long(task.path, samples, kind.records, data.seq_len, longest))
    lines += [line for path, phrases in split.left_out.items() for line in not_used(path, phrases)]
    return "\n".join([*filter(None, lines), evaluated(data, split, kind)])


def not_used(path: Path, phrases: Counter[str]) -> list[str]:
    """Return a sentence for each thing that records of a file have and that is not used, the most frequent first."""
    return [
        f"{path}: {number(n, 'records')} {'has' if n == 1 else 'have'} {phrase}." for phrase, n in phrases.most_common()
    ]


def counts(samples: Samples, unit: str) -> str:
    """Return a sentence on how many records, tokens and targets there are, and one on those without a target."""
    stats = samples.stats
    records, turns = stats[unit], stats.get("turns", stats[unit])
    answers = f" with {number(turns, 'answers')}" if turns != records else ""
    text = f"{number(records, unit)}{answers}, {number(stats['tokens'], 'tokens')}, "
    text += f"of which {stats['targets']:,} are answers and are trained on."
    for name, why in (("without_target", "without an answer to train"), ("alike", "with two equal answers")):
        if n := stats.get(name):
            text += f" {number(n, unit)} {why} {'is' if n == 1 else 'are'} skipped."
    return text


def lengths(samples: Samples) -> str:
    """Return a sentence on how long the samples are, in tokens."""
    sizes = np.diff(samples.offsets.astype(np.int64))
    shortest, half, most, longest = (int(n) for n in np.percentile(sizes, (0, 50, 90, 100), method="inverted_cdf"))
    return (
        f"The shortest sample has {number(shortest, 'tokens')}, half have at most {half:,}, "
        f"nine in ten at most {most:,}, the longest has {longest:,}."
    )


def too_long(path: Path, samples: Samples, unit: str, seq_len: int, longest: int | None = None) -> str:
    """Return a sentence on the records that are longer than a row of `seq_len` tokens, with the flag that would help;
    "" where there are none. longest: number of positions that the model has, if it is known."""
    stats = samples.stats
    fates = {
        "cut": "cut at the end",
        "dropped": "skipped (--data.too_long cut would keep the beginning)",
        "beyond": "skipped (the answer begins after the end of the row)",
    }
    parts = [
        f"{stats[name]:,} {'is' if stats[name] == 1 else 'are'} {fate}" for name, fate in fates.items() if stats[name]
    ]
    if not parts:
        return ""
    share = sum(stats[name] for name in fates) / stats[unit]
    text = f"{path}: {share:.0%} of the {unit} are longer than a row of {seq_len} tokens: {' and '.join(parts)}. "
    text += f"--data.seq_len {samples.enough} would keep 90% of them whole"
    if longest is not None and samples.enough > longest:
        text += (
            f", for which the model needs more than its {longest} positions: continue its pretraining with "
            f"pretrain.py --init_from and --model.max_seq_len {samples.enough}"
        )
    return text.replace("%", " %") + "."


def evaluated(data: DataArgs, split: Split, kind: Kind) -> str:
    """Return a sentence on the data that the model is evaluated on during training."""
    if split.heldout is None:
        missing = ", ".join(str(task.heldout) for task in data.tasks if task.heldout is not None)
        why = f"there is no {missing}" if missing else f"none of the {kind.records} are held out"
        wanted = not missing and not data.heldout_share
        what_to_do = "" if wanted else "; raise --data.heldout_share, or name a file with --data.heldout"
        return f"{why}: nothing is evaluated during training{what_to_do}"
    sizes = " + ".join(f"{len(samples) // len(kind.texts):,}" for samples in split.heldout)
    share = f"{data.heldout_share:.0%} of ".replace("%", " %") + ", ".join(str(task.path) for task in data.tasks)
    files = ", ".join(str(task.heldout) for task in data.tasks if task.heldout is not None)
    text = f"held out to evaluate on: {sizes} {kind.records} ({files or f'{share}, by the hash of their questions'})"
    fewest = min(filter(None, (len(samples) // len(kind.texts) for samples in split.heldout)))
    if fewest >= ENOUGH_HELD_OUT:
        return text
    few = f"{number(fewest, kind.records)} held out {'is' if fewest == 1 else 'are'} too few"
    return (
        f"{text}\n{few} to tell a small gain from chance, {ENOUGH_HELD_OUT} or more would do: "
        "raise --data.heldout_share, or name a file with --data.heldout"
    )


def composition(data: DataArgs, split: Split) -> list[dict[str, Any]]:
    """Return what each task has to train on and what is held out of it, for the record of the run."""
    rows = []
    for task, trained, heldout in zip(data.tasks, split.trained, split.heldout or [None] * len(split.trained)):
        names = {"name": task.name, "path": str(task.path), "broken": len(split.broken.get(task.path, []))}
        rows.append(names | {"held_out": False} | trained.stats)
        if heldout is not None:
            rows.append({"name": task.name, "path": str(task.heldout or task.path), "held_out": True} | heldout.stats)
    return rows


def number(n: int, unit: str) -> str:
    """Return the number and the plural `unit`, which loses its s after 1."""
    return f"{n:,} {unit.removesuffix('s') if n == 1 else unit}"


def sample_texts(samples: Samples, n_records: int, kind: Kind, tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    """Yield the first records as text, what is trained in green or, without `colour`, in double brackets."""
    for n in range(min(n_records * len(kind.texts), len(samples))):
        record, text = divmod(n, len(kind.texts))
        here = np.s_[int(samples.offsets[n]) : int(samples.offsets[n + 1])]
        ids, mask = samples.ids[here], samples.mask[here]
        title = " ".join(filter(None, ["sample", str(record + 1), kind.texts[text]]))
        yield f"--- {title}: {number(len(ids), 'tokens')}, of which {mask.sum():,} are trained"
        yield marked(tokenizer, ids, mask, colour)

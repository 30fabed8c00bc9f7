"""The data of a fine-tuning run: files of conversations, or of pairs of answers -> what is trained and what is held out
of each task -> the batches of the loop, and what is told of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np

from chat.samples import Samples, encode_pairs, encode_samples, read_pairs, read_samples
from chat.template import ChatTemplate
from corpora import BadRecord
from dataset import BatchSource
from dataset_sft import PairData, SFTData
from tuning import mixture
from tuning.args import DataArgs, Packing, split_paths

ANY_LENGTH = 2**31  # tokens: longer than any sample


def read_data(
    data: DataArgs, paths: list[Path], template: ChatTemplate, broken: dict[Path, list[BadRecord]], in_pairs: bool
) -> tuple[list[Samples], list[Samples] | None]:
    """What is trained and what is held out of each task, None if nothing is; the records that are none go to `broken`,
    by file."""
    options = {"template": template, "too_long": data.too_long} | ({} if in_pairs else {"train_on": data.train_on})
    read = partial(read_pairs if in_pairs else read_samples, **options)
    encode = partial(encode_pairs if in_pairs else encode_samples, seq_len=data.seq_len, **options)
    given = split_paths(data.heldout)
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

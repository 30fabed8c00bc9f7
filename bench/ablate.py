"""Compare settings of a training by paired runs: variants are flags, each runs with the same seeds.

    python bench/ablate.py --config configs/tiny.yaml --flags="--train.max_minutes 2" --seeds 3 \\
        --variants "base:" "muon 9e-3: --optim.muon_lr 9e-3" "no decay: --optim.weight_decay 0"

The first variant is the one that the others are compared with. A variant is a name, a colon, and flags of the script;
`--flags` are for all of them. Runs of one seed follow each other, so that a change of the machine's speed strikes all
variants alike. A row is added to `results.tsv` after every run, and runs that have a row are not repeated.

Equal seeds give equal first weights and batches, so the differences within a seed vary less than the losses do: the
table has their mean with the 95 % interval of Student's t. Two seeds give an interval several times as wide as three.
"""

from __future__ import annotations

import csv
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from files import read_json, read_rows

ROOT = Path(__file__).parents[1]
COLUMNS = ("variant", "seed", "metric", "steps", "tokens", "seconds", "seconds_to_target", "flags")
# Student's t, 0.975 quantile, of 1, 2, ... degrees of freedom (Abramowitz and Stegun, table 26.10)
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Args:
    """Compare settings of a training by paired runs."""

    variants: tuple[str, ...]
    """'NAME: FLAGS' each, FLAGS of the script; the first is what the others are compared with"""
    config: Path = Path("configs/tiny.yaml")
    """preset of all runs"""
    script: Literal["pretrain", "fine_tuning"] = "pretrain"
    """script that trains"""
    flags: str = ""
    """flags of all runs, such as '--train.max_minutes 2' for equal time, or '--train.max_steps 300' for equal steps"""
    seeds: int = 3
    """runs of each variant, with the seeds 0, 1, ..."""
    metric: str = "loss"
    """number of result.json to compare; less is better"""
    target: float | None = None
    """held-out loss: also compare the seconds until an evaluation reached it (--train.eval_interval says how fine)"""
    out: Path = Path("out/ablate")
    """directory of the runs and of results.tsv"""

    def __post_init__(self) -> None:
        """Raise ValueError for a variant without a name, for equal names, and for too few of anything."""
        for text in self.variants:
            if not text.partition(":")[0].strip() or ":" not in text:
                raise ValueError(f"--variants: expected 'NAME: FLAGS', found {text!r}")
        if len(dict(map(parsed, self.variants))) < max(2, len(self.variants)):
            raise ValueError("--variants: expected two or more, with different names")
        if self.seeds < 2:
            raise ValueError(f"--seeds should be 2 or more, found {self.seeds}: one run has no interval")


def parsed(variant: str) -> tuple[str, list[str]]:
    """Return the name and the flags of a variant."""
    name, _, flags = variant.partition(":")
    return name.strip(), shlex.split(flags)


def main(args: Args) -> list[dict[str, Any]]:
    """Do the runs that are missing, print the comparison, and return it."""
    table = args.out / "results.tsv"
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for name, flags in map(parsed, args.variants):
            mine = shlex.join([*shlex.split(args.flags), *flags])
            same = [row for row in read_table(table) if (row["variant"], row["seed"]) == (name, str(seed))]
            if any(row["flags"] != mine for row in same):
                raise SystemExit(f"{table} has {name!r} with other flags ({same[0]['flags']}): choose another --out")
            if not same:
                add(table, {"variant": name, "seed": seed, "flags": mine} | run(args, name, mine, seed))
    compared = compare(args, read_table(table))
    print_comparison(args, compared)
    return compared


def run(args: Args, name: str, flags: str, seed: int) -> dict[str, Any]:
    """Train one variant with one seed; return its numbers. Raises SystemExit with the end of its output if it fails."""
    out = args.out / "runs" / f"{name.replace('/', '_')}_{seed}"
    command = [sys.executable, f"{args.script}.py", "--config", str(args.config.resolve()), *shlex.split(flags)]
    command += ["--train.seed", str(seed), "--train.keep", "1", "--out", str(out.resolve())]
    print(shlex.join(command), file=sys.stderr, flush=True)
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}, failed:\n" + "\n".join(done.stderr.splitlines()[-10:]))
    result, rows = read_json(out / "result.json") or {}, read_rows(out / "metrics.jsonl")
    if args.metric not in result:
        raise SystemExit(f"--metric {args.metric} is not in {out / 'result.json'} (there are: {', '.join(result)})")
    numbers = {"metric": result[args.metric], "steps": result["steps"], "tokens": result["tokens"]}
    reached = "" if args.target is None else seconds_to(args.target, rows)
    return numbers | {"seconds": round(time.perf_counter() - began, 1), "seconds_to_target": reached}


def seconds_to(target: float, rows: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of the loop until the first evaluation with a loss of at most `target`; inf: there is none.

    rows: of metrics.jsonl; those with the rate have the seconds.
    """
    reached = next((row["step"] for row in rows if row.get("eval_loss", math.inf) <= target), math.inf)
    return next((row["seconds"] for row in rows if "seconds" in row and row["step"] >= reached), math.inf)


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results.tsv; [] where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def add(path: Path, row: dict[str, Any]) -> None:
    """Add one row to a results.tsv."""
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t")
        if new:
            writer.writeheader()
        writer.writerow(row)


def compare(args: Args, rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Return, for each variant and number: its mean, and its difference from the first variant with an interval."""
    compared = []
    names = [name for name, _ in map(parsed, args.variants)]
    for column in ("metric", "seconds_to_target") if args.target is not None else ("metric",):
        of = {(row["variant"], int(row["seed"])): float(row[column]) for row in rows}
        for name in names:
            values = [of[name, seed] for seed in range(args.seeds)]
            differences = [of[name, seed] - of[names[0], seed] for seed in range(args.seeds)]
            mean, half = interval(differences)
            row = {"variant": name, "number": column, "mean": statistics.fmean(values)}
            compared.append(row | {"difference": mean, "half_width": half})
    return compared


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of some values and half the width of its 95 % interval, by Student's t."""
    if not all(map(math.isfinite, values)):  # a run that never reached the target
        return math.nan, math.nan
    freedom = len(values) - 1
    t = T[freedom - 1] if freedom <= len(T) else 1.96 + 2.5 / freedom
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def print_comparison(args: Args, compared: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    titles = {"metric": args.metric, "seconds_to_target": f"seconds to a held-out loss of {args.target}"}
    for number in dict.fromkeys(row["number"] for row in compared):
        print(f"\n{titles[number]}, {args.seeds} seeds{'':10}mean   difference   95 % interval of the difference")
        for row in compared:
            if row["number"] == number:
                print(f"{row['variant']:<32}{row['mean']:10.4f}  {told(row)}")


def told(row: dict[str, Any]) -> str:
    """Return the difference of a variant in words."""
    mean, half = row["difference"], row["half_width"]
    if math.isnan(mean):
        return "  (not reached in every run)"
    if mean == half == 0:
        return ""
    verdict = "no difference seen" if abs(mean) <= half else "better" if mean < 0 else "worse"
    return f"{mean:+11.4f}   {mean - half:+.4f} to {mean + half:+.4f}   {verdict}"


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

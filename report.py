"""Write a report of a run, or of several side by side, as one page of HTML that opens from disk.

python report.py out/tiny/sft                                  -> out/tiny/sft/report.html
python report.py out/tiny/pretrain out/try --out compare.html  two runs with their differences
python report.py out/tiny                                      all runs below a directory

It works while a run is in progress, and for quantized models (the directory that quantize.py wrote). Files that are
missing or damaged are named on the page.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cli.args import parse, run
from files import write_text
from reporting.page import page
from reporting.record import QUANTIZATION, TRAINING, Run, read_run

MARKS = ("metrics.jsonl", "config.yaml", QUANTIZATION)


@dataclass(frozen=True)
class Args:
    """Write a report of a run, or of several side by side, as one page of HTML that opens from disk."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """directories of runs, of quantized models, or of several of them (out/tiny)"""
    out: Path | None = None
    """file of the page; default: report.html in the directory, if there is only one"""


def main(args: Args) -> dict[str, str | int]:
    """Write the page; return where it is, and how many runs and findings it has."""
    if not args.runs:
        raise ValueError("expected a directory of a run, such as: python report.py out/tiny/sft")
    if args.out is None and len(args.runs) > 1:
        raise ValueError("several runs need --out FILE.html: name the file of the page")
    out = args.out or args.runs[0] / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out} should end in .html")
    runs = [each for directory in args.runs for each in read_below(directory)]
    command = shlex.join(["python", "report.py", *map(str, args.runs), "--out", str(out)])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(runs, command))
    print(out)
    return {"page": str(out), "runs": len(runs)}


def read_below(directory: Path) -> list[Run]:
    """Return the run in a directory or, where it is none, the runs in the directories below it."""
    below = [path for path in sorted(directory.glob("*/")) if not path.is_symlink() and is_run(path)]
    if is_run(directory) or not below:
        return [read_run(directory)]
    runs = [read_run(path) for path in below]
    return sorted(runs, key=lambda each: [*TRAINING, each.kind].index(each.kind))


def is_run(directory: Path) -> bool:
    """Return whether a directory is that of a training run or of a quantized model."""
    return (directory / "metrics.jsonl").is_file() or (directory / QUANTIZATION).is_file()


if __name__ == "__main__":
    run(main, parse(Args, "report"))

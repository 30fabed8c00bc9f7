"""Odd flags, presets and model directories, thousands of times: each is accepted or refused in one sentence.

python -m tests.fuzz --trials 300 --seed 1               so many trials of each kind, and a table
python -m tests.fuzz --only directories                  kinds whose names contain this text; --list prints the names
python -m tests.fuzz --only 'flags: eval' --first 17 --trials 1        trial 17 alone
python -m tests.fuzz --results out/fuzz.jsonl            lines that `python -m tests.damage --table` reads

A trial is one mutation: of one or two flags of a script, of a field of a preset in configs/, of a field of a JSON file
in the directory of a tiny model, which is then loaded and asked. Nothing is trained. A trial held if nothing else than
one readable sentence came of it, in at most 5 seconds; the exit status is 1 where one did not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from cli.extras import need  # noqa: E402

need("tests.fuzz", "dev", "transformers")

from helpers.fuzz_kinds import Trial, build, kinds  # noqa: E402

SLOW, HANGS = 5.0, 30  # seconds: of computing, by the clock
LONGEST = 1500  # characters of a sentence
# what Python says of its own values, which no message may say where it does not name a file that is to blame
PYTHON = "empty sequence|codec can't|invalid literal|not supported between|object is not|has no attribute|null byte"
PYTHON += (
    "|list index|indices must|cannot convert|unhashable|to unpack|division by zero|domain error|too large|PosixPath"
)
PROMISES = {
    "flags": "Odd flags: accepted, or refused in one sentence",
    "pairs of flags": "Odd pairs of flags: accepted, or refused in one sentence",
    "presets": "Odd presets: accepted, or refused in one sentence",
    "directories": "Model directories with odd JSON: answered with, or refused in one sentence",
}
ENDS = ("accepted", "sentences", "tracebacks", "slow")


class Ended(NamedTuple):
    """How a trial ended: a word of ENDS, and the sentence or the traceback."""

    how: str
    said: str


class Hangs(BaseException):
    """What the alarm raises in a trial."""


def outcome(call: Callable[[], object]) -> Ended:
    """Call what a trial calls, as a script does it, and return how it ended."""
    from cli.args import run

    began, output = time.process_time(), io.StringIO()
    ended = Ended("accepted", "")
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), alarm(HANGS):
        try:
            run(lambda _: call(), None)
        except SystemExit as stop:
            ended = judged(stop.code)
        except Hangs:
            ended = Ended("slow", f"hangs:\n{traceback.format_exc()}")
        except BaseException:
            ended = Ended("tracebacks", traceback.format_exc())
    seconds = time.process_time() - began
    if ended.how in ("accepted", "sentences") and seconds > SLOW:
        return Ended("slow", f"{seconds:.1f} s: {ended.said}")
    return ended


def judged(code: object) -> Ended:
    """Return how a trial ended that exits with this code or message."""
    if code in (None, 0):  # --help
        return Ended("accepted", "")
    said = str(code)
    plain = ".json" in said or ".yaml" in said or "transformers cannot load" in said or not re.search(PYTHON, said)
    whole = said.startswith("error: ") and "\n" not in said and len(said) <= LONGEST and plain
    return Ended("sentences" if whole else "tracebacks", said[: 2 * LONGEST])


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise Hangs in the block when it takes longer."""

    def ring(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(kind: str, make: Callable[[Path, random.Random], Trial], number: int, seed: int, world: Path) -> dict:
    """Do one trial of a kind; return its row of results."""
    rng = random.Random(hashlib.sha256(f"{seed} {kind} {number}".encode()).digest())
    trial = make(world, rng)
    ended = outcome(trial.call)
    verdict = {"tracebacks": "traceback", "slow": "lost"}.get(ended.how, "held")
    row = {"kind": f"fuzz: {kind}", "promise": PROMISES[kind.partition(":")[0]], "trial": number, "seed": seed}
    note = f"{trial.words}: {ended.said}" if ended.said else f"{trial.words}: accepted"
    return row | {"verdict": verdict, "note": note, "how": ended.how}


def table(rows: list[dict]) -> str:
    """Return a table of Markdown: how the trials of each kind ended."""
    lines = ["| kind | trials | " + " | ".join(ENDS) + " |", "|---|" + "---:|" * (1 + len(ENDS))]
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        counts = Counter(row["how"] for row in rows if kind in ("all", row["kind"]))
        numbers = [counts.total(), *(counts[how] for how in ENDS)]
        lines.append(f"| {kind.removeprefix('fuzz: ')} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    return "\n".join(lines)


def described(row: dict) -> str:
    """Return a row of a trial that did not hold as a text to print."""
    text = f"{row['how']}: {row['kind']}, trial {row['trial']} of seed {row['seed']}: {row['note']}"
    return text.encode("utf8", "backslashreplace").decode()


@contextlib.contextmanager
def world() -> Iterator[Path]:
    """Yield a folder with the files that trials start from, which is the working directory within the block."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch), contextlib.ExitStack() as stack:
        sys.stdin, before = io.StringIO(), sys.stdin  # what a chat reads: nothing
        stack.callback(setattr, sys, "stdin", before)
        with warnings.catch_warnings(action="ignore"):
            yield build(Path(scratch))


def try_all(chosen: dict[str, Callable], args: argparse.Namespace) -> list[dict]:
    """Do the trials; return their rows, which stand in the file --results, too."""
    rows = []
    with world() as folder, contextlib.ExitStack() as stack:
        file = stack.enter_context(args.results.open("a", encoding="utf8")) if args.results else None
        for kind, make in chosen.items():
            for number in range(args.first, args.first + args.trials):
                rows.append(row := attempt(kind, make, number, args.seed, folder))
                if row["verdict"] != "held":
                    print(described(row), flush=True)
                if file:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
            print(table([row for row in rows if row["kind"] == f"fuzz: {kind}"]).splitlines()[2], flush=True)
    return rows


def main() -> None:
    """Do the trials, and print the table and what did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="number of trials of each kind (default: 100)")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only kinds whose names contain this text; several with |")
    parser.add_argument("--results", type=lambda path: Path(path).absolute(), help="a file to which results are added")
    parser.add_argument("--list", action="store_true", help="print the kinds")
    args = parser.parse_args()
    chosen = {kind: make for kind, make in kinds().items() if any(word in kind for word in args.only.split("|"))}
    if args.list:
        print(*chosen, sep="\n")
        return
    rows = try_all(chosen, args)
    print(f"\n{table(rows)}")
    sys.exit(any(row["verdict"] != "held" for row in rows))


if __name__ == "__main__":
    main()

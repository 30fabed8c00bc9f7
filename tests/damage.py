"""Kill, damage, fill and forge, hundreds of times, and count what of the promises in docs/reliability.md held.

python -m tests.damage                      everything, with the counts of docs/reliability.md (hours)
python -m tests.damage --only kill          the kinds whose names contain this text; --list prints the names
python -m tests.damage --trials 1           one trial of each kind
python -m tests.damage --table out/damage.jsonl     print the table of earlier results

Each trial has a seed of its own (--seed, the kind, its number) and a line in the file --results; trials that have one
are not repeated. The exit status is 1 where one did not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from cli.extras import need  # noqa: E402

need("tests.damage", "dev", "psutil", "pytest", "transformers")

from helpers.damage_files import damages  # noqa: E402
from helpers.damage_inputs import inputs  # noqa: E402
from helpers.damage_kills import kills  # noqa: E402
from helpers.damage_markers import forgeries  # noqa: E402
from helpers.damage_ranks import rank_kills  # noqa: E402
from helpers.damage_runs import VERDICTS, Kind, build, load_libraries  # noqa: E402


def kinds() -> dict[str, Kind]:
    """Return every kind of trial by name."""
    return kills() | rank_kills() | damages() | inputs() | forgeries()


def main() -> None:
    """Do the trials, and print the table and what did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, help="number of trials of each kind (default: that of the full run)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only kinds whose names contain this text; several with |")
    parser.add_argument("--results", type=Path, help="a file to which a JSON line for each trial is added")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these files of results, try nothing")
    parser.add_argument("--list", action="store_true", help="print the kinds and their numbers of trials")
    args = parser.parse_args()
    chosen = {name: kind for name, kind in kinds().items() if any(word in name for word in args.only.split("|"))}
    if args.list:
        print(*(f"{kind.trials:5}  {name}" for name, kind in chosen.items()), sep="\n")
        return
    results = [row for path in args.table for row in read(path)] if args.table else try_all(chosen, args)
    print(table(results))
    wrong = [row for row in results if row["verdict"] != "held"]
    for row in wrong:
        print(f"\n{row['verdict']}: {row['kind']}, trial {row['trial']} of seed {row['seed']}: {row['note']}")
    sys.exit(bool(wrong))


def try_all(chosen: dict[str, Kind], args: argparse.Namespace) -> list[dict]:
    """Do the trials that have no result yet; return all results."""
    results = read(args.results) if args.results else []
    done = {(row["kind"], row["trial"], row["seed"]) for row in results}
    load_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        world = build(Path(scratch))
        for name, kind in chosen.items():
            for number in range(kind.trials if args.trials is None else min(args.trials, kind.trials)):
                if (name, number, args.seed) in done:
                    continue
                seed = hashlib.sha256(f"{args.seed} {name} {number}".encode()).digest()
                result = kind.trial(world, random.Random(seed))
                row = {"kind": name, "promise": kind.promise, "trial": number, "seed": args.seed, **result._asdict()}
                results.append(row)
                if args.results:
                    with args.results.open("a", encoding="utf8") as file:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                print(f"{name} {number}: {' '.join(result)[:200]}", file=sys.stderr, flush=True)
    return results


def read(path: Path) -> list[dict]:
    """Return the results in a file; [] where there is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] if path.is_file() else []


def table(results: list[dict]) -> str:
    """Return a table of Markdown: each promise with its trials, and how they ended."""
    rows = ["| promise | trials | " + " | ".join(VERDICTS) + " |", "|---|" + "---:|" * (1 + len(VERDICTS))]
    promises = dict.fromkeys(row["promise"] for row in results)
    for promise in [*promises, None]:
        verdicts = [row["verdict"] for row in results if promise in (None, row["promise"])]
        counts = [len(verdicts), *(verdicts.count(verdict) for verdict in VERDICTS)]
        rows.append(f"| {promise or 'all'} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()

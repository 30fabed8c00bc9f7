"""How far each backend is from one process: losses, gradient norms and final weights of the same runs.

python -m tests.backends                       print the table: every backend, 1, 2 and 4 processes
python -m tests.backends --write               and keep it in docs/distributed.md
python -m tests.backends --only fsdp --processes 2 --results FILE      goes on where it was stopped

The runs are those of tests/helpers/backend_run.py: nine steps of a small model with clipped gradients, on rows of a
token bin and on conversations of unequal lengths, with and without accumulation, and with a row whose loss is not
finite. In float64 (also Muon's iteration) where the backend has it; DeepSpeed's is float32. The learning rate and the
number of targets of every step have to be equal, and so has what the guards did.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # as pytest has it

from safetensors.torch import load_file  # noqa: E402

DOCUMENT = TESTS.parent / "docs" / "distributed.md"
MARKS = ("<!-- backends -->\n", "<!-- /backends -->\n")  # the table stands between them
WIDE = {"wide": True}
# what tensor parallel can divide, and micro-batches for the stages of a pipeline
DIVIDED = WIDE | {"micro": 2, "shape": {"n_heads": 4, "n_kv_heads": 2, "vocab_size": 30}}
MUON = {"optimizer": "muon"}


def divided(**flags: Any) -> dict[str, Any]:
    """Fields of a case with --train.tp and --train.pp."""
    return DIVIDED | {"train": flags}


# name in the table -> backend, fields of backend_run.Case
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp, AdamW": ("ddp", WIDE),
    "ddp, Muon": ("ddp", WIDE | {"optimizer": "muon"}),
    "fsdp, AdamW": ("fsdp", WIDE),
    "fsdp, Muon": ("fsdp", WIDE | {"optimizer": "muon"}),
    "tp 2, AdamW": ("ddp", divided(tp=2)),
    "tp 2, Muon": ("ddp", divided(tp=2) | MUON),
    "pp 2 (1F1B), AdamW": ("ddp", divided(pp=2)),
    "pp 2 (GPipe), Muon": ("ddp", divided(pp=2, pp_schedule="gpipe") | MUON),
    "tp 2, fsdp, AdamW": ("fsdp", divided(tp=2)),
    "pp 2 (1F1B), fsdp, Muon": ("fsdp", divided(pp=2) | MUON),
    "tp 2, pp 2 (1F1B), Muon": ("ddp", divided(tp=2, pp=2) | MUON),
    **{f"deepspeed, ZeRO {n}": ("deepspeed", {"train": {"zero_stage": str(n)}}) for n in range(4)},
    "deepspeed, ZeRO 2, offload": ("deepspeed", {"train": {"zero_stage": "2", "zero_offload": True}}),
}
# name in the table -> fields of backend_run.Case
DATA = {
    "token bin": {},
    "token bin, accumulated": {"micro": 1},
    "conversations": {"data": "ragged"},
    "conversations, accumulated": {"data": "ragged", "micro": 1},
    # the loss of one row, on one process, is infinite: a step is skipped, and after three in a row the run goes back
    "token bin, guarded": {"bad": [3, 7, 8, 9], "steps": 14},
}
COLUMNS = ("loss", "norm", "weights")


def start(folder: Path, backend: str, processes: int, cases: Iterable[dict[str, Any]]) -> None:
    """Run cases on a backend; exit with what it says where it fails."""
    words = [json.dumps({"backend": backend} | case) for case in cases]
    launch = [] if backend == "single" else ["-m", "torch.distributed.run", "--standalone"]
    launch += [] if backend == "single" else ["--nproc_per_node", str(processes)]
    command = [sys.executable, *launch, str(TESTS / "helpers" / "backend_run.py"), str(folder), *words]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{TESTS.parent}:{TESTS}")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{backend} on {processes} processes failed:\n{done.stderr}")


def apart(folder: Path, one: str, other: str) -> dict[str, float]:
    """Return the largest relative difference of losses and norms, and the largest absolute one of weights.

    Exits where a rate, a number of targets or what the guards did differs.
    """
    ours, theirs = (json.loads((folder / f"{name}.json").read_text()) for name in (one, other))
    found = dict.fromkeys(COLUMNS, 0.0)
    if len(ours["steps"]) != len(theirs["steps"]):
        raise SystemExit(f"{other}: {len(theirs['steps'])} steps, not {len(ours['steps'])}")
    if ours["guards"] != theirs["guards"]:
        raise SystemExit(f"{other}: the guards did {theirs['guards']}, not {ours['guards']}")
    for number, (a, b) in enumerate(zip(ours["steps"], theirs["steps"]), 1):
        if math.isfinite(a[2]) != math.isfinite(b[2]):
            raise SystemExit(f"{other}, step {number}: norm {b[2]} instead of {a[2]}")
        if (a[1], a[3]) != (b[1], b[3]):
            raise SystemExit(f"{other}, step {number}: rate and targets {b[1]}, {b[3]} instead of {a[1]}, {a[3]}")
        for name, i in (("loss", 0), ("norm", 2)) if math.isfinite(a[2]) else ():
            found[name] = max(found[name], abs(a[i] - b[i]) / abs(a[i]))
    mine, other_weights = (load_file(folder / name / "last" / "model.safetensors") for name in (one, other))
    for name, weight in mine.items():
        found["weights"] = max(found["weights"], (weight.double() - other_weights[name].double()).abs().max().item())
    return found


def measure(only: str, processes: list[int], results: list[dict[str, Any]], file: Path | None) -> None:
    """Add to `results`, and to the JSON lines in `file`, what `apart` returns for each backend, data and number of
    processes that they have not yet."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, (backend, fields) in BACKENDS.items():
            of_one = {key: value for key, value in fields.items() if key != "train"}
            alone = json.dumps(of_one)
            part = fields.get("train", {}).get("tp", 1) * fields.get("train", {}).get("pp", 1)
            for world in (each for each in processes if only in name and each % part == 0):
                had = [row["data"] for row in results if (row["backend"], row["processes"]) == (name, world)]
                missing = {data: more for data, more in DATA.items() if data not in had}
                named = [of_one | more | {"name": f"{alone} {data}"} for data, more in missing.items()]
                named = [case for case in named if not (folder / f"{case['name']}.json").exists()]
                if named:
                    start(folder, "single", 1, named)
                if missing:
                    named = [fields | more | {"name": f"{name} {world} {data}"} for data, more in missing.items()]
                    start(folder, backend, world, named)
                for data in missing:
                    row = {"backend": name, "data": data, "processes": world}
                    row |= apart(folder, f"{alone} {data}", f"{name} {world} {data}")
                    results.append(row)
                    line = json.dumps(row)
                    print(line, file=sys.stderr, flush=True)
                    if file is not None:
                        with file.open("a", encoding="utf8") as out:
                            out.write(line + "\n")


def table(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: the largest difference over the numbers of processes that were tried."""
    rows = ["| backend | rows of | processes | losses | norms | weights |", "|---|---|---|---:|---:|---:|"]
    for name in BACKENDS:
        for data in DATA:
            found = [row for row in results if (row["backend"], row["data"]) == (name, data)]
            if found:
                worst = (f"{max(row[column] for row in found):.0e}" for column in COLUMNS)
                numbers = ", ".join(str(row["processes"]) for row in sorted(found, key=lambda row: row["processes"]))
                rows.append(f"| {name} | {data} | {numbers} | " + " | ".join(worst) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only backends whose names contain this text")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--write", action="store_true", help="replace the table in docs/distributed.md")
    parser.add_argument("--results", type=Path, help="JSON lines; what they have already is not measured again")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    if args.results is not None and args.results.is_file():
        results = [json.loads(line) for line in args.results.read_text(encoding="utf8").splitlines()]
    measure(args.only, args.processes, results, args.results)
    rows = table(results)
    print(rows)
    if args.write:
        before, _, rest = DOCUMENT.read_text(encoding="utf8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        DOCUMENT.write_text(before + MARKS[0] + rows + MARKS[1] + after, encoding="utf8")


if __name__ == "__main__":
    main()

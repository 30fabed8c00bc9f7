"""How far each backend is from one process: losses, gradient norms and final weights of the same runs.

python -m tests.backends                       print the table: every backend, 1, 2 and 4 processes
python -m tests.backends --write               and keep it in docs/distributed.md
python -m tests.backends --only fsdp --processes 2

The runs are those of tests/helpers/backend_run.py: nine steps of a small model with clipped gradients, on rows of a
token bin and on conversations of unequal lengths, with and without accumulation. In float64 (also Muon's
iteration) where the backend has it; DeepSpeed's is float32. The learning rate and the number of targets of every step
have to be equal.
"""

from __future__ import annotations

import argparse
import json
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
# name in the table -> backend, fields of backend_run.Case
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp, AdamW": ("ddp", WIDE),
    "ddp, Muon": ("ddp", WIDE | {"optimizer": "muon"}),
    "fsdp, AdamW": ("fsdp", WIDE),
    "fsdp, Muon": ("fsdp", WIDE | {"optimizer": "muon"}),
    **{f"deepspeed, ZeRO {n}": ("deepspeed", {"train": {"zero_stage": str(n)}}) for n in range(4)},
    "deepspeed, ZeRO 2, offload": ("deepspeed", {"train": {"zero_stage": "2", "zero_offload": True}}),
}
# name in the table -> fields of backend_run.Case
DATA = {
    "token bin": {},
    "token bin, accumulated": {"micro": 1},
    "conversations": {"data": "ragged"},
    "conversations, accumulated": {"data": "ragged", "micro": 1},
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

    Exits where a rate or a number of targets differs.
    """
    ours, theirs = (json.loads((folder / f"{name}.json").read_text()) for name in (one, other))
    found = dict.fromkeys(COLUMNS, 0.0)
    if len(ours["steps"]) != len(theirs["steps"]):
        raise SystemExit(f"{other}: {len(theirs['steps'])} steps, not {len(ours['steps'])}")
    for number, (a, b) in enumerate(zip(ours["steps"], theirs["steps"]), 1):
        if (a[1], a[3]) != (b[1], b[3]):
            raise SystemExit(f"{other}, step {number}: rate and targets {b[1]}, {b[3]} instead of {a[1]}, {a[3]}")
        for name, i in (("loss", 0), ("norm", 2)):
            found[name] = max(found[name], abs(a[i] - b[i]) / abs(a[i]))
    mine, other_weights = (load_file(folder / name / "last" / "model.safetensors") for name in (one, other))
    for name, weight in mine.items():
        found["weights"] = max(found["weights"], (weight.double() - other_weights[name].double()).abs().max().item())
    return found


def measure(only: str, processes: list[int]) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """Return (backend, data) -> number of processes -> what `apart` returned."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, (backend, fields) in BACKENDS.items():
            if only not in name:
                continue
            of_one = {key: value for key, value in fields.items() if key != "train"}
            key = json.dumps(of_one)
            cases = {data: of_one | more for data, more in DATA.items()}
            if not (folder / f"{key} token bin.json").exists():
                start(folder, "single", 1, [case | {"name": f"{key} {data}"} for data, case in cases.items()])
            for world in processes:
                named = [fields | DATA[data] | {"name": f"{name} {world} {data}"} for data in DATA]
                start(folder, backend, world, named)
                for data in DATA:
                    difference = apart(folder, f"{key} {data}", f"{name} {world} {data}")
                    found.setdefault((name, data), {})[world] = difference
                    print(name, data, world, difference, file=sys.stderr, flush=True)
    return found


def table(found: dict[tuple[str, str], dict[int, dict[str, float]]], processes: list[int]) -> str:
    """Return the table in Markdown."""
    heads = [f"{world} process{'es' * (world > 1)}: loss, norm, weights" for world in processes]
    rows = ["| backend | rows | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(processes)]
    for (name, data), by_world in found.items():
        cells = [", ".join(f"{by_world[world][column]:.0e}" for column in COLUMNS) for world in processes]
        rows.append(f"| {name} | {data} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only backends whose names contain this text")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--write", action="store_true", help="replace the table in docs/distributed.md")
    args = parser.parse_args()
    rows = table(measure(args.only, args.processes), args.processes)
    print(rows)
    if args.write:
        before, _, rest = DOCUMENT.read_text(encoding="utf8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        DOCUMENT.write_text(before + MARKS[0] + rows + MARKS[1] + after, encoding="utf8")


if __name__ == "__main__":
    main()

"""Measure how long a step waits for a checkpoint: whole or sharded, written at once or while steps go on.

    python bench/saving.py                                             # 15M and 60M, one process and two under FSDP2
    python bench/saving.py --sizes 15M --ways "fsdp sharded"

Each row is a run of pretrain.py, with AdamW in float32 on one thread a process. Times are those of rank 0, medians:

    step      a step while no checkpoint is written
    at once   a save after which the loop waits until the checkpoint is on the disk
    stall     a save after which it does not wait: until the next step begins
    later     from there until the checkpoint appears
    during    a step while the checkpoint is written
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from bench.scaling import SHAPES, write_data

WAYS = {  # name -> backend, processes, --train.save
    "single": ("single", 1, "whole"),
    "single sharded": ("single", 1, "sharded"),
    "fsdp": ("fsdp", 2, "whole"),
    "fsdp sharded": ("fsdp", 2, "sharded"),
}
COLUMNS = ("step", "at once", "stall", "later", "during")


@dataclass(frozen=True)
class Args:
    """Measure how long a step waits for a checkpoint."""

    sizes: tuple[Literal[tuple(SHAPES)], ...] = ("15M", "60M")  # type: ignore[valid-type]
    """models"""
    ways: tuple[Literal[tuple(WAYS)], ...] = tuple(WAYS)  # type: ignore[valid-type]
    """backends and forms of checkpoints"""
    saves: int = 3
    """saves of each kind that are measured, after one of each kind"""
    interval: int = 4
    """steps between two saves"""


def main(args: Args) -> None:
    """Measure and print the table."""
    print(f"{'model':6}{'checkpoint':16}" + "".join(f"{name:>9}" for name in COLUMNS) + "   seconds")
    with tempfile.TemporaryDirectory(prefix="saving_") as name:
        write_data(Path(name))
        for size in args.sizes:
            for way in args.ways:
                row = measure(Path(name), size, way, args)
                print(f"{size:6}{way:16}" + "".join(f"{row[name]:9.3f}" for name in COLUMNS), flush=True)


def measure(folder: Path, size: str, way: str, args: Args) -> dict[str, float]:
    """Run one case in processes of its own; return its medians."""
    (shape, length, rows), (backend, world, save) = SHAPES[size], WAYS[way]
    words = shape.split()
    flags = [word for name, value in zip(words[::2], words[1::2]) for word in (f"--model.{name}", value)]
    flags += ["--data.dir", folder, "--data.seq_len", length, "--data.batch_size", rows * world]
    flags += ["--optim.optimizer", "adamw", "--train.max_steps", 2 * (args.saves + 1) * args.interval + 1]
    flags += ["--train.save_interval", args.interval, "--train.save", save, "--train.keep", 1]
    flags += ["--train.dtype", "fp32", "--train.compile", "off", "--train.device", "cpu", "--train.log_interval", 0]
    flags += ["--train.sample_tokens", 0, "--train.backend", backend]
    flags += ["--out", folder / "run", "--train.resume", "never"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", world] if world > 1 else []
    command = [sys.executable, *launch, __file__, "--worker", folder / "found.json", *flags]
    done = subprocess.run([str(w) for w in command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stderr.decode(errors='replace')[-3000:]}")
    return json.loads((folder / "found.json").read_text())


def work(found: Path, flags: list[str]) -> None:
    """Train as pretrain.py does, wait for every second checkpoint, and write the medians of rank 0."""
    import pretrain
    from cli.args import parse
    from training.state import Checkpoints, TrainState
    from training.trainer import Trainer

    seconds: dict[str, list[float]] = {name: [] for name in COLUMNS}
    saved_at = [0.0]
    save, publish, step = Checkpoints.save, Checkpoints._publish, Trainer._step

    def save_timed(self: Checkpoints, state: TrainState, is_best: bool = False) -> None:
        began, waits = time.perf_counter(), (len(seconds["stall"]) + len(seconds["at once"])) % 2 == 0
        save(self, state, is_best)
        if waits:
            self.wait()
        seconds["at once" if waits else "stall"].append(time.perf_counter() - began)
        saved_at[0] = time.perf_counter()

    def publish_timed(self: Checkpoints, *more: Any) -> None:
        publish(self, *more)
        if len(seconds["stall"]) > len(seconds["later"]) and saved_at[0]:
            seconds["later"].append(time.perf_counter() - saved_at[0])

    def step_timed(self: Trainer) -> float:
        began, writing = time.perf_counter(), self.checkpoints._pending is not None
        norm = step(self)
        seconds["during" if writing else "step"].append(time.perf_counter() - began)
        return norm

    Checkpoints.save, Checkpoints._publish, Trainer._step = save_timed, publish_timed, step_timed
    pretrain.main(parse(pretrain.Args, "pretrain", flags))
    if int(os.environ.get("RANK", "0")) == 0:
        found.write_text(json.dumps({name: statistics.median(values[1:]) for name, values in seconds.items()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(tyro.cli(Args))

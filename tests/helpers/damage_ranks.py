"""Kills of runs of two and of four processes, on every backend: a signal to one rank, to all, or to torchrun, at any
step or while it saves. What goes on afterwards ends with the very same losses and bytes, and no rank lives on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from helpers.damage_kills import after_kill
from helpers.damage_runs import TRAININGS, Kind, Result, World, computed, difference, logged
from helpers.forked import Ended

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
BACKENDS = {
    "ddp": (["--train.backend", "ddp"], ("pretrain, Muon", "LoRA", "DPO")),
    "fsdp": (["--train.backend", "fsdp"], ("pretrain, Muon", "LoRA", "DPO")),
    "fsdp, sharded": (["--train.backend", "fsdp", "--train.save", "sharded"], ("pretrain, Muon", "DPO")),
    "ZeRO 2, sharded": (
        ["--train.backend", "deepspeed", "--train.save", "sharded", "--optim.optimizer", "adamw"],
        ("pretrain, AdamW, bf16",),
    ),
    "ZeRO 2": (["--train.backend", "deepspeed", "--optim.optimizer", "adamw"], ("pretrain, AdamW, bf16", "DPO, LoRA")),
    "ZeRO 3": (
        ["--train.backend", "deepspeed", "--train.zero_stage", "3", "--optim.optimizer", "adamw"],
        ("pretrain, AdamW, bf16",),
    ),
}
"""name -> flags, names of TRAININGS"""
STEPS = 20  # of each of TRAININGS


def torchrun(world: World, processes: int, command: str, flags: list[str]) -> subprocess.Popen:
    """Start a script on several processes."""
    name, *words = command.split()
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with (world.folder / "said.txt").open("wb") as said:
        return subprocess.Popen(
            [*TORCHRUN, str(processes), str(REPOSITORY / f"{name}.py"), *words, *flags],
            cwd=world.folder, env=environment, stdout=said, stderr=said,
        )  # fmt: skip


def kill_ranks(backend: str, name: str, processes: int) -> Callable[[World, random.Random], Result]:
    """Return a trial that signals one rank, all processes or torchrun alone, and lets the run go on."""
    flags = BACKENDS[backend][0]

    def undisturbed(world: World) -> dict[str, Any]:
        whole = world.folder / f"{processes}_{backend.replace(' ', '')}_{list(TRAININGS).index(name)}"
        if torchrun(world, processes, f"{TRAININGS[name]} --out {whole}", flags).wait(900):
            raise SystemExit((world.folder / "said.txt").read_text())
        return computed(whole)

    def trial(world: World, rng: random.Random) -> Result:
        expected = world.once(f"{processes}: {backend} {name}", lambda: undisturbed(world))
        out = world.fresh() / "run"
        command = f"{TRAININGS[name]} --out {out}"
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        step, saving, whom = rng.randint(0, STEPS - 2), rng.random() < 0.4, rng.choice(["rank", "all", "torchrun"])
        first = torchrun(world, processes, command, flags)
        while first.poll() is None and not (logged(out) >= step and (not saving or is_saving(out))):
            time.sleep(0.0005 if saving else 0.005)
        if not saving:
            time.sleep(rng.random() * 0.1)
        if first.poll() is not None:
            return Result("held", "ended before the signal")
        alive = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        ranks = [each for each in alive if f"{command.split()[0]}.py" in " ".join(each.cmdline()[1:2])]
        hit = {"rank": rng.choices(ranks or alive), "all": alive, "torchrun": alive[:1]}[whom]
        what = f"{number.name} to {whom} at step {step}{' while it saves' if saving else ''}"
        for process in hit:
            process.send_signal(number)
        status = first.wait(180)
        said = (world.folder / "said.txt").read_text(errors="replace")
        left = psutil.wait_procs(alive[1:], timeout=15)[1]
        for process in left:
            process.kill()
        if left:
            return Result("lost", f"{what}: {len(left)} ranks live 15 s after torchrun has ended")
        if whom == "rank" and number == signal.SIGKILL and ranks and str(hit[0].pid) not in said:
            return Result("lost", f"{what}: nothing names the process {hit[0].pid}")
        again = torchrun(world, processes, command, flags).wait(600)
        more = (world.folder / "said.txt").read_text(errors="replace")
        both = Ended(status, without_torchrun(said), 0, 0), Ended(again, without_torchrun(more), 0, 0)
        result = after_kill(*both, lambda: difference(expected, computed(out)), number, step / STEPS)
        return result._replace(note=f"{what}: {result.note}")

    return trial


def is_saving(out: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return any(out.glob(".step_*.writing"))


def without_torchrun(said: str) -> str:
    """Return what processes said without the tracebacks of torchrun itself, which shows one for every failed rank."""
    begin = "Traceback (most recent call last)"
    first, *blocks = said.split(begin)
    ours = [block for block in blocks if "torch/distributed/run.py" not in block and "SignalException" not in block]
    return first + "".join(begin + block for block in ours)


def rank_kills() -> dict[str, Kind]:
    """Return the kinds of trials of this file by name."""
    promise = (
        "After SIGKILL or SIGTERM at any moment the same command ends with every loss and byte of an undisturbed run "
        "(training, {} processes), and no rank lives on"
    )
    two = {
        f"kill two: {backend}, {name}": Kind(promise.format("two"), 6, kill_ranks(backend, name, 2))
        for backend, (_, names) in BACKENDS.items()
        for name in names
    }
    four = {
        f"kill four: {backend}, {names[0]}": Kind(promise.format("four"), 4, kill_ranks(backend, names[0], 4))
        for backend, (_, names) in BACKENDS.items()
        if backend != "ZeRO 3"
    }
    return two | four

"""Kills and full disks: what goes on afterwards ends with the very same losses and bytes."""

from __future__ import annotations

import ctypes
import json
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from helpers.damage_runs import TRAININGS, Kind, Result, World, computed, difference, tree
from helpers.forked import Child, Ended, script

# what is killed besides training: the command, with OUT for the place of the result
OTHERS = {
    "data_process, one process": "data_process --input texts.jsonl --tokenizer data/tokenizer --out OUT --held_out 0.1"
    " --processes 1 --tokens_per_file 1000 --save_all_text True",
    "data_process, two processes": "data_process --input texts.jsonl --tokenizer data/tokenizer --out OUT"
    " --processes 2 --tokens_per_file 1000",
    "train_tokenizer": "train_tokenizer --input texts.jsonl --out OUT --vocab_size 700",
    "quantize": "quantize --model model/best --out OUT --method rtn --device cpu",
    "convert merge": "convert merge --model model/best --adapter adapter --out OUT",
    "eval --input": "eval --model model/best --raw True --input questions.jsonl --output OUT --device cpu --dtype fp32"
    " --batch_size 2 --sampling.max_new_tokens 8",
}


def small_batches() -> None:
    """Let data_process save its progress after every few documents."""
    import bins.screen
    import data_process

    bins.screen.BATCH_ITEMS, data_process.CHECKPOINT_SECONDS = 4, 0.0


def kill_once(
    start: Callable[[], Child], seconds: float, number: int, rng: random.Random
) -> tuple[Ended, float] | None:
    """Send a signal at a random moment of a run that takes about `seconds`; None where it ended before, five times."""
    share = rng.random()
    for _ in range(5):
        child = start()
        time.sleep(share * seconds)
        if child.send(number):
            return child.finish(), share
        child.finish()
        share *= 0.7
    return None


def kill_training(name: str) -> Callable[[World, random.Random], Result]:
    """Return a trial that kills a run of TRAININGS and lets it go on."""

    def trial(world: World, rng: random.Random) -> Result:
        expected, seconds = world.training(name)
        out = world.fresh() / "run"
        command = f"{TRAININGS[name]} --out {out}"
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        if (killed := kill_once(lambda: world.start(command), seconds, number, rng)) is None:
            return Result("held", "ended before the signal")
        ended, share = killed
        return after_kill(ended, world.run(command), lambda: difference(expected, computed(out)), number, share)

    return trial


def after_kill(ended: Ended, again: Ended, differs: Callable[[], str], number: int, share: float) -> Result:
    """Return the result of a trial from the process that was killed and the same command once more."""
    what = f"{signal.Signals(number).name} at {share:.0%}"
    for each in (ended, again):
        if each.traceback:
            return Result("traceback", f"{what}: {each.said[-1500:]}")
    if again.status:
        return Result("lost", f"{what}: the same command ends with {again.status}: {again.said[-300:]}")
    wrong = differs()
    return Result("silent", f"{what}: {wrong}") if wrong else Result("held", what)


def undisturbed(world: World, name: str) -> tuple[dict[str, bytes], float]:
    """Return the files that one of OTHERS writes, and its seconds."""

    def make() -> tuple[dict[str, bytes], float]:
        if name == "convert merge":
            world.need(f"{TRAININGS['LoRA']} --out adapter_run")
            (world.folder / "adapter").symlink_to("adapter_run/best")
        folder = world.fresh("undisturbed")
        ended = world.run(OTHERS[name].replace("OUT", f"{folder}/out"), before=small_batches)
        if ended.status:
            raise SystemExit(f"{name}: {ended.said}")
        return tree(folder), ended.seconds

    return world.once(name, make)


def kill_other(name: str) -> Callable[[World, random.Random], Result]:
    """Return a trial that kills one of OTHERS and repeats it: its files are those of an undisturbed run."""

    def trial(world: World, rng: random.Random) -> Result:
        expected, seconds = undisturbed(world, name)
        folder = world.fresh()
        command = OTHERS[name].replace("OUT", f"{folder}/out")
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        killed = kill_once(lambda: world.start(command, before=small_batches), seconds, number, rng)
        if killed is None:
            return Result("held", "ended before the signal")
        again = repeat(world, command)
        return after_kill(killed[0], again, lambda: contents_differ(expected, tree(folder)), number, killed[1])

    return trial


def repeat(world: World, command: str) -> Ended:
    """Run a command once more; quantize.py and convert.py may say that their result is there already."""
    again = world.run(command, before=small_batches)
    if "exists already" in again.said:
        again.status = 0
    return again


def contents_differ(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
    """Return which files differ, in words; "" where all are equal."""
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    return f"{', '.join(wrong[:3])} differ" if wrong else ""


# ---- two at once


def lock(name: str) -> Callable[[World, random.Random], Result]:
    """Return a trial that starts a command twice: one of the two is refused, and the other one is not disturbed."""

    def trial(world: World, rng: random.Random) -> Result:
        expected, seconds = world.training(name) if name in TRAININGS else undisturbed(world, name)
        folder = world.fresh()
        command = f"{TRAININGS[name]} --out OUT" if name in TRAININGS else OTHERS[name]
        command = command.replace("OUT", f"{folder}/out")
        first = script(command, world.folder, world.folder / "said_first.txt", before=small_batches)
        time.sleep(0.6 * rng.random() * seconds)
        second = world.run(command, before=small_batches)
        ended = first.finish()
        for each in (ended, second):
            if each.traceback:
                return Result("traceback", each.said[-1500:])
        refused = [each for each in (ended, second) if "another process is at work" in each.said]
        if any(each.status and each not in refused for each in (ended, second)):
            return Result("lost", f"{ended.said[-200:]} {second.said[-200:]}")
        if len(refused) == 2:
            return Result("lost", "both are refused")
        found = computed(folder / "out") if name in TRAININGS else tree(folder)
        wrong = (difference if name in TRAININGS else contents_differ)(expected, found)
        return Result("silent", wrong) if wrong else Result("held", f"{len(refused)} refused")

    return trial


# ---- a full disk


def limit_files(most: int) -> Callable[[], None]:
    """Return a function after which no file of this process may grow beyond `most` bytes."""

    def limit() -> None:
        small_batches()
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return limit


def full_disk(name: str) -> Callable[[World, random.Random], Result]:
    """Return a trial on a disk of a random size; then there is room, and the command is repeated.

    It is a disk in memory, for the processes of the trial alone. Without the right to have one, and in every other
    trial, no file may grow beyond a random size, which has the same errors of writing.
    """

    def trial(world: World, rng: random.Random) -> Result:
        expected, _ = world.training(name) if name in TRAININGS else undisturbed(world, name)
        folder, answer = world.fresh(), world.folder / "answer.json"
        command = (f"{TRAININGS[name]} --out {folder}/out") if name in TRAININGS else OTHERS[name]
        command, own_disk, size = command.replace("OUT", f"{folder}/out"), rng.random() < 0.5, rng.random()
        answer.unlink(missing_ok=True)

        def work() -> None:
            most = int(10 ** (3.7 + 1.6 * size))  # bytes: 5 to 200 kB; what the program says is a file, too
            whole = 1 << 20 if name in TRAININGS else 1 << 18
            if mounted := own_disk and mount(folder, int(size * whole) + 4096):
                most = 1 << 30
            full = world.run(command, before=limit_files(most))
            if mounted:
                mount(folder, 1 << 30, again=True)
            again = repeat(world, command)
            wrong = ""
            if not again.status:
                found = computed(folder / "out") if name in TRAININGS else tree(folder)
                wrong = (difference if name in TRAININGS else contents_differ)(expected, found)
            where = f"a disk of {size:.0%} of 1 MB" if mounted else f"no file above {most} bytes"
            result = after_full(full, again, wrong)
            answer.write_text(json.dumps([result.verdict, f"{where}: {result.note}"]))

        ended = Child(work, world.folder / "said_outside.txt").finish()
        if not answer.is_file():
            return Result("traceback", ended.said[-1500:])
        return Result(*json.loads(answer.read_text()))

    return trial


def after_full(full: Ended, again: Ended, wrong: str) -> Result:
    """Return the result of a trial from the process without room, the one with room, and what differs at the end."""
    for each in (full, again):
        if each.traceback:
            return Result("traceback", each.said[-1500:])
    if again.status:
        return Result("lost", f"with room again, the command ends with {again.status}: {again.said[-300:]}")
    if full.status and "error: " not in full.said:
        return Result("lost", f"status {full.status} without a sentence: {full.said[-300:]}")
    return Result("silent", wrong) if wrong else Result("held", "one sentence" if full.status else "there was room")


def mount(folder: Path, size: int, again: bool = False) -> bool:
    """Put an empty disk of `size` bytes at `folder`, for this process and its children alone, or resize it (`again`);
    return whether that worked."""
    libc = ctypes.CDLL(None)
    own_mounts, private, remount = 0x20000, 0x44000, 0x20  # CLONE_NEWNS, MS_PRIVATE | MS_REC, MS_REMOUNT
    if not again and (libc.unshare(own_mounts) or libc.mount(None, b"/", None, private, None)):
        return False
    flags = remount if again else 0
    return not libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, f"size={size}".encode())


def kills() -> dict[str, Kind]:
    """Return the kinds of trials of this file by name."""
    promise = (
        "After SIGKILL or SIGTERM at any moment the same command ends with every loss and byte of an undisturbed run"
    )
    found = {f"kill: {name}": Kind(promise + " (training, one process)", 5, kill_training(name)) for name in TRAININGS}
    counts = {"data_process, one process": 30, "data_process, two processes": 6, "train_tokenizer": 24}
    for name in OTHERS:
        found[f"kill: {name}"] = Kind(
            promise + " (data, tokenizer, models, answers)", counts.get(name, 10), kill_other(name)
        )
    for name in ("pretrain, Muon", "DPO", "data_process, one process", "train_tokenizer"):
        promise_of_lock = "Of two processes in one directory one is refused, and the other one is not disturbed"
        found[f"lock: {name}"] = Kind(promise_of_lock, 6, lock(name))
    promise = "A full disk is one sentence; with room again, the same command ends with the bytes of an undisturbed run"
    for name in ("pretrain, Muon", "pretrain, sharded", "LoRA", "DPO", *OTHERS):
        found[f"full disk: {name}"] = Kind(promise, 10, full_disk(name))
    return found

"""Damage to the files that the programs wrote themselves: nothing of it is used in silence."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.damage_kills import OTHERS, contents_differ, small_batches, undisturbed
from helpers.damage_runs import TRAININGS, Kind, Result, World, computed, difference, logged, tree
from helpers.forked import Ended

HARMS = ("a flipped bit", "a block of zeros", "cut off", "missing")
EVAL = "eval --model MODEL --raw True --prompt the --device cpu --dtype fp32 --sampling.temperature 0"
EVAL += " --sampling.max_new_tokens 12"


def harm(path: Path, how: str, rng: random.Random) -> None:
    """Damage a file in one of the ways of HARMS, at a random place. Its permissions and date may change, too."""
    if how == "missing":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data)) if data else 0
    if how == "cut off" or not data:
        data = data[:at]
    elif how == "a flipped bit":
        data[at] ^= 1 << rng.randrange(8)
    else:
        size = min(512, max(1, len(data) // 4))
        data[at : at + size] = bytes(len(data[at : at + size]))
    path.unlink()  # a new file: others may be linked to the old one
    path.write_bytes(data)


def judge(ended: Ended, path: Path, what: str, differs: Callable[[], str]) -> Result:
    """Return the result of a command that met a damaged file: refused with its name, or the same result as without."""
    if ended.traceback:
        return Result("traceback", f"{what}: {ended.said[-1500:]}")
    names = (path.name, path.stem, path.parent.name, path.parent.parent.name)
    if ended.status:
        named = any(name in ended.said for name in names)
        return Result("held" if named else "lost", f"{what}: {ended.said[-300:]}")
    if wrong := differs():
        named = path.name in ended.said and "damaged" in ended.said
        return Result("held" if named else "silent", f"{what}: {wrong} {ended.said[-200:] if named else ''}")
    return Result("held", f"{what}: the same result")


# ---- runs that go on


def interrupted(world: World, name: str) -> Path:
    """Return the folder of a run of TRAININGS that was stopped behind step 13; copy it before use."""

    def make() -> Path:
        out = world.folder / f"stopped_{list(TRAININGS).index(name)}"
        child = world.start(f"{TRAININGS[name]} --out {out}")
        while logged(out) < 13 and not child.poll():
            time.sleep(0.002)
        child.send(signal.SIGTERM)
        child.finish()
        return out

    world.training(name)
    return world.once(f"stopped {name}", make)


FILES_OF_RUN = {
    "weights": "last/*.safetensors",
    "parts of a sharded checkpoint": "last/sharded/*",
    "optimizer and random state": "last/training_state/state.pt",
    "sums of a checkpoint": "last/training_state/*.json",
    "config.json": "last/*config.json",
    "tokenizer of a checkpoint": "last/tokenizer*",
    "metrics.jsonl": "metrics.jsonl",
    "config.yaml, run.json": "*.[yj][as][mo][ln]",
    "reference.npz": "reference.npz",
}


def resume(pattern: str, names: tuple[str, ...]) -> Callable[[World, random.Random], Result]:
    """Return a trial that damages a file of an interrupted run, which then goes on."""

    def trial(world: World, rng: random.Random) -> Result:
        name, how = rng.choice(names), rng.choice(HARMS)
        out = world.fresh() / "run"
        shutil.copytree(interrupted(world, name), out, symlinks=True)
        path = rng.choice(sorted(out.glob(pattern)))
        what = f"{name}, {path.name}, {how}"
        harm(path, how, rng)
        path = path.parent.resolve() / path.name
        ended = world.run(f"{TRAININGS[name]} --out {out}")
        expected, _ = world.training(name)
        return judge(ended, path, what, lambda: difference(expected, computed(out)))

    return trial


def finished(world: World, rng: random.Random) -> Result:
    """Damage a file of a finished run and repeat its command: it has nothing to do, or says what is wrong."""
    name, how = rng.choice(["pretrain, Muon", "LoRA", "DPO"]), rng.choice(HARMS)
    out = world.fresh() / "run"
    shutil.copytree(world.whole(name), out, symlinks=True)
    path = rng.choice([*out.glob("*.json"), *out.glob("last/*.safetensors"), *out.glob("best/*.safetensors")])
    what = f"{name}, {path.name}, {how}"
    harm(path, how, rng)
    ended = world.run(f"{TRAININGS[name]} --out {out}")
    expected, _ = world.training(name)
    return judge(ended, path.parent.resolve() / path.name, what, lambda: difference(expected, computed(out)))


# ---- inputs of a run


def bins(world: World, rng: random.Random) -> Result:
    """Damage a file of the token bins, or their tokenizer, and pretrain."""
    folder, how = world.fresh(), rng.choice(HARMS)
    shutil.copytree(world.folder / "data", folder / "data")
    files = [path for path in (folder / "data").glob("[th]*.*") if path.suffix in (".bin", ".idx", ".json")]
    path = rng.choice(sorted([*files, *(folder / "data/tokenizer").glob("tokenizer.model")]))
    harm(path, how, rng)
    name = "pretrain, Muon"
    ended = world.run(f"{TRAININGS[name].replace('--data.dir data', f'--data.dir {folder}/data')} --out {folder}/run")
    expected, _ = world.training(name)
    return judge(ended, path, f"{path.name}, {how}", lambda: difference(expected, computed(folder / "run")))


def model(world: World, rng: random.Random) -> Result:
    """Damage a file of a model that is asked or trained on."""
    use, how, folder = rng.choice(["eval", "fine-tuning", "LoRA"]), rng.choice(HARMS), world.fresh()
    shutil.copytree((world.folder / "model/best").resolve(), folder / "model/best")
    files = [path for path in (folder / "model/best").iterdir() if path.is_file()]
    path = rng.choice(sorted(files))
    harm(path, how, rng)
    what = f"{use}, {path.name}, {how}"
    if use == "eval":
        expected = world.once("answer", lambda: world.need(EVAL.replace("MODEL", "model/best")).said)
        ended = world.run(EVAL.replace("MODEL", f"{folder}/model/best"))
        return judge(ended, path, what, lambda: "" if ended.said == expected else f"another answer: {ended.said[:200]}")
    command = TRAININGS[use].replace("--init_from model/best", f"--init_from {folder}/model/best")
    ended = world.run(f"{command} --out {folder}/run")
    expected, _ = world.training(use)
    return judge(ended, path, what, lambda: difference(expected, computed(folder / "run")))


def adapters(world: World, rng: random.Random) -> Result:
    """Damage a file of an adapter that is merged."""
    how, folder = rng.choice(HARMS), world.fresh()
    expected, _ = undisturbed(world, "convert merge")
    shutil.copytree((world.folder / "adapter").resolve(), folder / "adapter")
    path = rng.choice(sorted(path for path in (folder / "adapter").iterdir() if path.is_file()))
    harm(path, how, rng)
    ended = world.run(f"convert merge --model model/best --adapter {folder}/adapter --out {folder}/out")
    whole = {name: data for name, data in expected.items() if name.endswith(".safetensors")}
    return judge(
        ended, path, f"{path.name}, {how}", lambda: contents_differ(whole, {name: tree(folder)[name] for name in whole})
    )


def unfinished_data(world: World, rng: random.Random) -> Result:
    """Damage a file that a killed data_process has left, and repeat the command."""
    name, how = "data_process, one process", rng.choice(HARMS)
    expected, seconds = undisturbed(world, name)
    folder = world.fresh()
    command = OTHERS[name].replace("OUT", f"{folder}/out")
    child = world.start(command, before=small_batches)
    part = folder / "out" / "data_process.part"
    while not (part / "train_00001.json").is_file() and not child.poll():
        time.sleep(0.001)
    time.sleep(rng.random() * seconds / 4)
    child.send(signal.SIGKILL)
    child.finish()
    where = part if part.is_dir() else folder / "out"
    path = rng.choice(sorted(path for path in where.iterdir() if path.is_file()))
    harm(path, how, rng)
    ended = world.run(command, before=small_batches)
    return judge(ended, path, f"{path.name}, {how}", lambda: contents_differ(expected, tree(folder)))


def finished_data(world: World, rng: random.Random) -> Result:
    """Damage a file of finished bins, repeat the command, and open them as pretraining does."""
    name, how = "data_process, one process", rng.choice(HARMS)
    expected, _ = undisturbed(world, name)
    folder = world.fresh()
    command = OTHERS[name].replace("OUT", f"{folder}/out")
    world.run(command, before=small_batches)
    path = rng.choice([path for path in sorted((folder / "out").iterdir()) if path.suffix in (".json", ".bin", ".idx")])
    harm(path, how, rng)
    ended = world.run(command, before=small_batches)
    result = judge(ended, path, f"{path.name}, {how}", lambda: contents_differ(expected, tree(folder)))
    if result.verdict != "silent":
        return result
    trained = world.run(
        TRAININGS["pretrain, Muon"].replace("data.dir data", f"data.dir {folder}/out") + f" --out {folder}/r"
    )
    return judge(trained, path, f"{path.name}, {how}, then pretrained on", lambda: result.note)


def library(world: World, rng: random.Random) -> Result:
    """Damage the compiled decoding step and ask the model."""
    how, folder = rng.choice(HARMS), world.fresh()
    caches = world.folder / "compiled"

    def cached(path: Path) -> Callable[[], None]:
        return lambda: os.environ.update(XDG_CACHE_HOME=str(path))

    expected = world.once(
        "compiled", lambda: world.run(EVAL.replace("MODEL", "model/best"), before=cached(caches)).said
    )
    shutil.copytree(caches, folder / "cache")
    libraries = list((folder / "cache").rglob("*.so"))
    if not libraries:
        return Result("held", "there is no compiler here")
    mode = libraries[0].stat().st_mode
    harm(libraries[0], how, rng)
    if libraries[0].exists():
        libraries[0].chmod(mode)
    ended = world.run(EVAL.replace("MODEL", "model/best"), before=cached(folder / "cache"))
    return judge(ended, libraries[0], how, lambda: "" if ended.said == expected else f"another answer: {ended.said}")


def damages() -> dict[str, Kind]:
    """Return the kinds of trials of this file by name."""
    found: dict[str, Any] = {}
    goes_on = "Damage to {} of a run that goes on: named, and an older whole checkpoint is used; or no loss changes"
    for what, pattern in FILES_OF_RUN.items():
        others = {"reference.npz": ("DPO", "DPO, LoRA"), "parts of a sharded checkpoint": ("pretrain, sharded",)}
        names = others.get(what, ("pretrain, Muon", "LoRA", "DPO"))
        count = 60 if "weights" in what or "state" in what else 40
        found[f"damage: {what}"] = Kind(goes_on.format(what), count, resume(pattern, names))
    refused = "Damage to {}: refused by name, or the result is the same"
    found["damage: finished run"] = Kind(refused.format("a finished run"), 40, finished)
    found["damage: bins"] = Kind(refused.format("token bins, their index, json and tokenizer"), 120, bins)
    found["damage: model"] = Kind(refused.format("a model to start from or to ask"), 120, model)
    found["damage: adapter"] = Kind(refused.format("an adapter to merge"), 60, adapters)
    found["damage: unfinished data"] = Kind(
        refused.format("what a killed data_process.py has left"), 60, unfinished_data
    )
    found["damage: finished data"] = Kind(refused.format("what data_process.py has written"), 60, finished_data)
    found["damage: library"] = Kind(refused.format("the compiled decoding step"), 8, library)
    return found

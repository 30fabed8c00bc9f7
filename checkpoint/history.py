"""How a model was made, as far as its directory and the records of its runs say it; without torch.

A run leaves config.yaml (its settings), run.json (its command, versions and inputs), metrics.jsonl, result.json and
samples.jsonl; a checkpoint in it leaves training_state/progress.json. A run that began with a checkpoint names it, so
that the run before it can be found, too.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import yaml

from checkpoint.adapter_config import read_adapter_config
from checkpoint.locate import is_adapter, model_in
from files import read_json_object, write_json

MOST_STAGES = 20
ORIGIN = "conversion.json"  # in a directory that convert.py has made: of what
QUANTIZED = "quantization_report.json"  # in one that quantize.py has made: its settings, among others


@dataclass(frozen=True)
class Data:
    """One source of a run's data."""

    name: str
    licence: str | None = None
    documents: int | None = None
    tokens: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Stage:
    """One run, and the checkpoint of it that was used; {} and None: not recorded."""

    run: Path
    script: str
    settings: dict[str, Any]
    record: dict[str, Any]
    progress: dict[str, Any]
    """step and tokens of the checkpoint"""
    result: dict[str, Any]
    """losses on all held-out data, where the checkpoint is the one that was measured"""
    on_the_way: dict[str, float]
    """losses of the last evaluation at or before the checkpoint's step, where there is no result"""
    samples: list[dict[str, Any]]
    """what the model wrote at that step"""
    data: list[Data] = field(default_factory=list)


def history(model: Path, run: Path | None, licences: Mapping[str, str]) -> tuple[list[Stage], str | None]:
    """Return the runs that made a model, the last one first, and the model that the first of them began with.

    run: directory of the run, for a model that does not lie in it; licences: of corpora by name
    """
    stages: list[Stage] = []
    at, begun_with, seen = model, None, set()
    while len(stages) < MOST_STAGES:
        source, stage = (None, None) if run else made_from(at)
        where = None if source else run or run_of(at)
        place = (at if source else where or at).resolve()
        if place in seen:
            return stages, None
        seen.add(place)
        if source:
            stages += [stage] if stage else []
            at = source
            continue
        if where is None:
            break
        run = None
        stages.append(read_stage(where, at, licences))
        begun_with = stages[-1].settings.get("init_from") or stages[-1].settings.get("model")
        if not isinstance(begun_with, str):
            return stages, None
        at = model_in(Path(begun_with))
    if not stages and is_adapter(model):
        base = read_adapter_config(model).get("base_model_name_or_path")
        return [], base if isinstance(base, str) else None
    return stages, begun_with


def write_origin(directory: Path, command: str, **sources: Path) -> None:
    """Say in a directory that convert.py has made what it was made of, so that its runs are found."""
    write_json(directory / ORIGIN, {"command": command} | {name: str(path) for name, path in sources.items()})


def made_from(model: Path) -> tuple[Path | None, Stage | None]:
    """Return the model (or adapter) that convert.py or quantize.py made this one of, as a file in it says, and the
    stage that this was: None for a copy or a merge. (None, None) where no file says so."""
    origin = read_object(model / ORIGIN)
    source = origin.get("adapter") or origin.get("model")
    settings = {} if source else read_object(model / QUANTIZED).get("settings")
    if isinstance(settings, dict) and isinstance(settings.get("model"), str):
        calib = settings.get("calib") if isinstance(settings.get("calib"), list) else []
        data = [Data(Path(str(name)).name) for name in calib]
        return model_in(Path(settings["model"])), Stage(model, "quantize", settings, {}, {}, {}, {}, [], data)
    return (model_in(Path(source)), None) if isinstance(source, str) else (None, None)


def run_of(model: Path) -> Path | None:
    """Return the directory with the record of the run that wrote a model: its own, or the one above it."""
    directories = (model, model.parent, model.resolve().parent)  # best may be a link to a step
    return next(
        (each for each in directories if (each / "config.yaml").is_file() and (each / "run.json").is_file()), None
    )


def read_stage(run: Path, model: Path, licences: Mapping[str, str]) -> Stage:
    """Return what the files of a run say of a checkpoint in it; damaged files count as missing."""
    settings = read_yaml(run / "config.yaml")
    script = next(iter(settings), "")
    own = settings.get(script) if isinstance(settings.get(script), dict) else {}
    record, result = read_object(run / "run.json"), read_object(run / "result.json")
    progress = read_object(model / "training_state/progress.json").get("progress", {})
    if Path(str(result.get("model", ""))).name not in (model.name, model.resolve().name):
        result = {}
    step = progress.get("step") or result.get("steps")
    rows = read_lines(run / "metrics.jsonl")
    evaluated = [row for row in rows if "eval_loss" in row and (step is None or row.get("step", 0) <= step)]
    on_the_way = {k.removeprefix("eval_"): v for k, v in evaluated[-1].items() if k != "step"} if evaluated else {}
    samples = [row for row in read_lines(run / "samples.jsonl") if row.get("step") == step]
    data = sources(own, record, licences)
    return Stage(run, script, own, record, progress, result, on_the_way if not result else {}, samples, data)


def sources(settings: dict[str, Any], record: dict[str, Any], licences: Mapping[str, str]) -> list[Data]:
    """Return where the training data of a run are from: of token bins the sources that they name, else the files."""
    found: dict[str, Data] = {}
    inputs = record.get("inputs") if isinstance(record.get("inputs"), dict) else {}
    for name, sha256 in inputs.items():
        path = Path(name)
        described = read_object(path) if path.suffix == ".json" else {}
        if isinstance(described.get("sources"), dict) and "tokens" in described:
            for source, documents in described["sources"].items():
                before = found[source].documents if source in found else 0
                found[source] = Data(source, licences.get(source), (before or 0) + documents, tokens_of(path, source))
        else:
            task = path.parent / "summary.json"
            corpora = read_object(task).get("made_from", {}).get("corpus", []) if path.suffix == ".jsonl" else []
            licence = "; ".join(f"{each}: {licences[each]}" for each in corpora if each in licences)
            found[name] = Data(path.name, licence or None, sha256=sha256)
    return list(found.values())


def tokens_of(path: Path, source: str) -> int | None:
    """Return the training tokens of a source by the summary.json beside a bin; None where it does not say them."""
    own = read_object(path.parent / "summary.json").get("sources", {}).get(source, {})
    return own["tokens"] - own.get("held_out_tokens", 0) if isinstance(own, dict) and "tokens" in own else None


def parameters(model: Path) -> int | None:
    """Return the number of values in the safetensors files of a directory, or in its sharded checkpoint, tied ones
    once; None where it has neither.

    Raises ValueError for a file that is damaged.
    """
    if (metadata := model / "sharded" / ".metadata").is_file():
        from checkpoint.sharded import ShardedFile  # loads torch

        file = ShardedFile(metadata)
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  not a mapping
    total = 0
    for path in (files := sorted(model.glob("*.safetensors"))):
        with path.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                head = json.loads(file.read(length)) if length < 1 << 27 else None
                total += sum(prod(each["shape"]) for name, each in head.items() if name != "__metadata__")
            except (ValueError, struct.error, AttributeError, KeyError, TypeError):
                raise ValueError(f"{path} is damaged: its header cannot be read; copy it again") from None
    return total if files else None


# ---- files that may be missing


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; {} where there is none."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        if isinstance(value := yaml.safe_load(path.read_text(encoding="utf8")), dict):
            return value
    return {}


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return read_json_object(path)
    return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSON Lines file; [] where there is none."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # a line that a kill has cut off
                found += [row] if isinstance(row := json.loads(line), dict) else []
    return found

"""The files of a run as one object; what is missing or damaged is named, and never an error. Without torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from cli.record import flat
from files import read_rows

QUANTIZATION = "quantization_report.json"
TRAINING = ("pretrain", "fine_tuning")  # sections of config.yaml whose runs have curves


@dataclass(frozen=True)
class Run:
    """What the directory of a run or of a model says; empty where a file is missing."""

    directory: Path
    kind: str = ""
    """section of config.yaml: pretrain, fine_tuning; quantize for a quantized model; "" where nothing says it"""
    settings: dict[str, Any] = field(default_factory=dict)
    """values by the names of their flags: {"optim.lr": 0.001}"""
    record: dict[str, Any] = field(default_factory=dict)
    """run.json"""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl"""
    samples: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """reports of eval.py by the names of their files"""
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """report of quantize.py: the numbers of each layer"""
    problems: list[str] = field(default_factory=list)
    """sentences on what is missing or damaged"""
    changed: float | None = None
    """when the log was last written, in seconds since 1970"""

    @property
    def name(self) -> str:
        """The last two parts of the path, such as tiny/sft."""
        return "/".join(self.directory.resolve().parts[-2:])

    @property
    def training(self) -> dict[str, Any]:
        """Sizes of the run: steps, parameters, device; {} for a run of an older version."""
        return _object(self.record.get("training"))

    @property
    def data(self) -> list[dict[str, Any]]:
        """What each bin or task held."""
        entries = self.record.get("data")
        return [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []

    @property
    def step(self) -> int:
        """The last step in the log."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def steps(self) -> int | None:
        """Number of steps of the whole run; None where nothing says it."""
        found = [self.training.get("steps"), self.settings.get("train.max_steps"), self.result.get("steps")]
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps and the values of a metric, in the order of the steps; values may be not finite."""
        pairs = {row["step"]: float(row[name]) for row in self.rows if is_number(row.get(name))}
        return sorted(pairs), [pairs[step] for step in sorted(pairs)]

    def names(self, prefix: str) -> list[str]:
        """Return the metrics whose names begin with `prefix`."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix)))


def is_number(value: Any) -> bool:
    """Return whether a value of a log is a number, perhaps one that is not finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(directory: Path) -> Run:
    """Read all files of a run. Raises ValueError where `directory` is none, or holds no file of a run."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory: expected that of a run, such as out/tiny/sft")
    problems: list[str] = []
    kind, settings = read_settings(directory, problems)
    report = read_object(directory / QUANTIZATION, problems)
    kind = kind or ("quantize" if report else "")
    path, wanted = directory / "metrics.jsonl", problems if kind in TRAINING else None
    run = Run(
        directory,
        kind,
        settings or flat(_object(report.get("settings"))),
        read_object(directory / "run.json", problems, wanted),
        read_rows(path),
        read_rows(directory / "samples.jsonl"),
        read_object(directory / "result.json", problems),
        read_evaluations(directory, problems),
        {name: each for name, each in _object(report.get("layers")).items() if isinstance(each, dict)},
        problems,
        path.stat().st_mtime if path.is_file() else None,
    )
    if not (run.kind or run.rows or run.result or run.evaluations):
        raise ValueError(
            f"{directory} holds no file of a run (config.yaml, metrics.jsonl, {QUANTIZATION} or a report of eval.py): "
            "expected the directory of a run, such as out/tiny/sft"
        )
    if kind in TRAINING and not path.is_file():
        problems.append("metrics.jsonl is missing: no curves")
    elif kind in TRAINING and not run.rows:
        problems.append("metrics.jsonl has no row yet: no curves")
    elif damaged := count_lines(path) - len(run.rows):
        problems.append(f"metrics.jsonl: {damaged} of its lines cannot be read and are left out")
    return run


def count_lines(path: Path) -> int:
    """Return the number of lines of a log that are not empty; 0 where there is none."""
    return sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) if path.is_file() else 0


def read_settings(directory: Path, problems: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the section of config.yaml that a run wrote, and its values by the names of their flags."""
    path = directory / "config.yaml"
    if not path.is_file():
        if (directory / "metrics.jsonl").is_file():
            problems.append("config.yaml is missing: the settings are not known")
        return "", {}
    try:
        whole = yaml.safe_load(path.read_text(encoding="utf8"))
        ((section, values),) = whole.items()
        return str(section), flat(values)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        problems.append("config.yaml is damaged: the settings are not known")
        return "", {}


def read_object(path: Path, problems: list[str], wanted: list[str] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file; {} where it is missing or damaged, which is named (missing: in `wanted`)."""
    if not path.is_file():
        if wanted is not None:
            wanted.append(f"{path.name} is missing")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name} is damaged")
        return {}
    return value


def read_evaluations(directory: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Return the reports of eval.py in a run, or beside a model: MODEL.TASK.json, poems.json."""
    others = ("run.json", "result.json", QUANTIZATION)  # `read_run` names them where they are damaged
    paths = [path for path in directory.glob("*.json") if ".items." not in path.name and path.name not in others]
    paths += directory.parent.glob(f"{directory.name}.*.json")
    found = {}
    for path in sorted(paths):
        if path.name.endswith((".begun.json", ".submission.json", "tokenizer.json", "config.json")):
            continue
        value = read_object(path, problems) if path.stat().st_size < 1 << 26 else {}
        if is_evaluation(value):
            found[path.name] = value
    return found


def is_evaluation(value: dict[str, Any]) -> bool:
    """Return whether a JSON object is a report of eval.py."""
    return "model_directory" in value and any(isinstance(value.get(key), dict) for key in ("all", "model", "measures"))


def when(run: Run) -> str:
    """Return the state of a run in words: finished, or when its log was last written."""
    if run.kind not in TRAINING:
        return "a model"
    if run.result:
        return f"finished after {run.step:,} steps"
    of = f" of {run.steps:,}" if run.steps else ""
    last = f", written {datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}" if run.changed else ""
    return f"not finished: step {run.step:,}{of} is the last in the log{last}"


def finite(values: list[float]) -> list[float]:
    """Return the values that are finite."""
    return [value for value in values if math.isfinite(value)]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

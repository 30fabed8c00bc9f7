"""Record a run: its settings, its command, versions of libraries, and hashes of its inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import typing
from datetime import datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cli.progress import Progress, say

# settings that change no loss, or whose effect the identity of a run compares: the weights that it starts from, its
# data, its model
FREE = ("out", "init_from", "show", "model.*", "data.dir", "data.train", "data.heldout")
FREE += tuple(f"train.{name}_interval" for name in ("log", "save", "eval"))
FREE += tuple(f"train.{name}" for name in ("keep", "resume", "metric", "patience", "eval_batches", "backend", "device"))
FREE += tuple(f"train.{name}" for name in ("prompts", "sample_tokens", "sample_minutes", "loggers", "log_norms"))
FREE += ("train.save", "train.rank_timeout")
FREE += tuple(f"train.{name}" for name in ("micro_batch_size", "gradient_checkpointing", "compile", "attention"))


def to_plain(args: Any) -> Any:
    """Convert a dataclass, also a nested one, to values for YAML and JSON: dicts, lists, numbers, strings."""
    if dataclasses.is_dataclass(args):
        return {f.name: to_plain(getattr(args, f.name)) for f in dataclasses.fields(args)}
    if isinstance(args, dict):
        return {str(k): to_plain(v) for k, v in args.items()}
    if isinstance(args, (list, tuple)):
        return [to_plain(v) for v in args]
    return args if isinstance(args, (bool, int, float, str, type(None))) else str(args)


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    path, digest = Path(path), hashlib.sha256()
    with path.open("rb") as file, Progress(f"hashing {path.name}", "B", path.stat().st_size) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.add(len(block))
    return digest.hexdigest()


def beginning(out: Path, fresh: bool) -> datetime:
    """Return when the run in `out` began, as its run.json says; now where it does not, or where the run is `fresh`."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if not fresh:
            return datetime.fromisoformat(json.loads((out / "run.json").read_text(encoding="utf8"))["began"])
    return datetime.now().replace(microsecond=0)


def record_training(
    out: Path,
    section: str,
    args: Any,
    inputs: typing.Iterable[Path],
    step: int,
    over: bool,
    began: datetime | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Record a training run that starts (`step` 0) or goes on after `step`; `over`: nothing is left to train.

    A setting that changes the losses and differs from the record of the steps so far is told, and kept under `changes`
    in run.json, as is the time at which the run `began`. about: more entries of run.json. Raises ValueError for such a
    setting where the run is over: it would not be used.
    """
    changes = changed_settings(out, section, args) if step else {}
    told = ", ".join(f"--{name} {new} (before: {old})" for name, (old, new) in changes.items())
    if over and changes:
        raise ValueError(
            f"{out} is finished ({step} steps), and these settings would not be used: {told}; choose another --out, or "
            "use --train.resume never to replace the run"
        )
    if over:
        return
    earlier = []
    if step:
        try:
            earlier = json.loads((out / "run.json").read_text(encoding="utf8")).get("changes", [])
        except (OSError, ValueError, AttributeError):  # does not stop the run
            say(f"{out / 'run.json'} is missing or damaged: it is written anew, without earlier changes of settings")
    if changes:
        say(f"{out} goes on after step {step} with other settings: {told}")
        earlier = [*earlier, {"after_step": step, "settings": changes}]
    more = (about or {}) | ({"changes": earlier} if earlier else {})
    record_run(out, section, args, inputs, more | ({"began": began.isoformat()} if began else {}))


def changed_settings(out: Path, section: str, args: Any) -> dict[str, tuple[Any, Any]]:
    """Return name -> (before, now) of the settings in `args` that change the losses and differ from `out/config.yaml`.

    Settings that the file does not have are left out, as is the whole where it is missing or damaged.
    """
    try:
        recorded = flat(yaml.safe_load((out / "config.yaml").read_text(encoding="utf8"))[section])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}
    compared = {
        name: value for name, value in flat(to_plain(args)).items() if not any(fnmatchcase(name, free) for free in FREE)
    }
    return {
        name: (recorded[name], value)
        for name, value in compared.items()
        if name in recorded and recorded[name] != value
    }


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under the names of their flags: {"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def record_run(
    out: Path, section: str, args: Any, inputs: typing.Iterable[Path] = (), more: dict[str, Any] | None = None
) -> None:
    """Write `out/config.yaml` and `out/run.json`, with the entries of `more` in the latter.

    config.yaml has the values of all settings and is a valid --config. run.json has the command line, the git commit,
    the versions of libraries and the SHA-256 of every input file.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({section: to_plain(args)}, allow_unicode=True, sort_keys=False)
    (out / "config.yaml").write_text(text, encoding="utf8")
    here = Path(__file__).parents[1]
    describe = ["git", "-C", here, "describe", "--always", "--dirty"]
    git = subprocess.run(describe, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    record = {
        "command": sys.argv,
        "git": git or None,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": system(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "sentencepiece", "safetensors")},
        "inputs": {str(path): file_sha256(path) for path in inputs},
    }
    (out / "run.json").write_text(json.dumps(record | (more or {}), indent=2), encoding="utf8")


def system() -> dict[str, Any]:
    """Return what is known of this machine: its system, processor, cores, memory in bytes, and GPUs."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):  # Linux
        text = Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace")
        processor = text.partition("model name")[2].splitlines()[0].partition(":")[2].strip() or processor
    found: dict[str, Any] = {"system": platform.platform(), "processor": processor}
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")  # a script without it, such as data_process.py, does not load it for this
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found

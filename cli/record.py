"""Record a run: its settings, its command, versions of libraries, and hashes of its inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import typing
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cli.progress import Progress


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


def record_run(out: Path, section: str, args: Any, inputs: typing.Iterable[Path] = ()) -> None:
    """Write `out/config.yaml` and `out/run.json`.

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
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "sentencepiece", "safetensors")},
        "inputs": {str(path): file_sha256(path) for path in inputs},
    }
    (out / "run.json").write_text(json.dumps(record, indent=2), encoding="utf8")

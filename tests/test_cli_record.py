"""What a run records about itself."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cli.record import record_run, to_plain


@dataclass(frozen=True)
class Inner:
    """The inner part."""

    size: int = 3
    scaling: dict[str, int] | None = None


@dataclass(frozen=True)
class Args:
    """A script of a test."""

    inner: Inner = field(default_factory=Inner)
    path: Path | None = None
    paths: tuple[Path, ...] = ()
    pair: tuple[float, float] = (0.9, 0.95)


def test_plain_values():
    args = Args(Inner(scaling={"a": (1, 2)}), path=Path("x"), paths=(Path("y"),))
    plain = to_plain(args)
    assert plain["inner"]["scaling"] == {"a": [1, 2]}
    assert (plain["path"], plain["paths"], plain["pair"]) == ("x", ["y"], [0.9, 0.95])
    assert json.loads(json.dumps(plain)) == plain


def test_record_says_what_made_the_run(tmp_path):
    data = tmp_path / "data.json"
    data.write_bytes(b"abc" * 1_000_000)
    record_run(tmp_path / "run", "pretrain", Args(), inputs=[data])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    digest = subprocess.run(["sha256sum", data], capture_output=True, text=True, check=True).stdout.split()[0]
    assert record["inputs"] == {str(data): digest}
    assert record["command"] == sys.argv
    assert {"torch", "numpy"} <= record["versions"].keys()
    assert "git" in record


def test_a_machine_without_git_records_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    record_run(tmp_path / "run", "pretrain", Args())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["git"] is None

"""Loggers beside metrics.jsonl: what reaches them, and that none of them stops a run."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from training import loggers
from training.args import LOGGERS, TrainArgs
from training.log import RunLog
from training.loggers import Loggers, known_as


class Recorder:
    """A logger that keeps what it gets; it fails at the step `fails`, or when it is closed (-1)."""

    made: ClassVar[list] = []

    def __init__(self, directory, first_step, kept, fails=None):
        self.values, self.closed, self.fails = [], False, fails
        Recorder.made.append(self)

    def write(self, step, values):
        if step == self.fails:
            raise ConnectionError("no route to the site\nmore lines")
        self.values.append((step, dict(values)))

    def close(self):
        if self.fails == -1:
            raise OSError("cannot finish")
        self.closed = True


@pytest.fixture
def stand_ins(monkeypatch):
    """Recorders in the place of the packages: wandb fails at step 2, swanlab cannot even begin."""
    Recorder.made = []

    def refuse(*_):
        raise RuntimeError("log in first")

    makers = {"tensorboard": Recorder, "wandb": lambda *a: Recorder(*a, fails=2), "swanlab": refuse}
    monkeypatch.setattr(loggers, "LOGGERS", makers)
    monkeypatch.setattr("training.log.draw_losses", lambda *_: None)
    return Recorder.made


def test_the_names_of_the_flag_are_those_of_the_classes():
    assert tuple(loggers.LOGGERS) == LOGGERS


def test_one_that_fails_is_named_once_and_the_others_go_on(tmp_path, stand_ins, capsys):
    log = RunLog(tmp_path, 0, 3, loggers=LOGGERS)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    board, wandb = stand_ins
    assert board.values == [(n, {"loss": float(n)}) for n in (1, 2, 3)] and board.closed
    assert wandb.values == [(1, {"loss": 1.0})] and not wandb.closed
    said = capsys.readouterr().err
    assert said.count("--train.loggers wandb has failed") == 1 and "goes on: no route to the site\n" in said
    assert "--train.loggers swanlab has failed" in said and "log in first" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_one_that_cannot_be_closed_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "LOGGERS", {"wandb": lambda *a: Recorder(*a, fails=-1)})
    Loggers(["wandb"], tmp_path, 0, []).close()
    assert "cannot finish" in capsys.readouterr().err


def test_no_loggers_at_all(tmp_path, stand_ins):
    log = RunLog(tmp_path, 0, 1, loggers=())
    log.write(1, {"loss": 1.0})
    log.close()
    assert stand_ins == [] and not (tmp_path / "tensorboard").exists()


def test_a_run_that_goes_on_keeps_its_name_at_the_site(tmp_path):
    assert known_as("wandb", tmp_path, "a", 0) == "a" and known_as("swanlab", tmp_path, "b", 0) == "b"
    assert known_as("wandb", tmp_path, "c", 10) == "a" and known_as("swanlab", tmp_path, "d", 10) == "b"
    assert known_as("wandb", tmp_path, "e", 0) == "e"  # started anew
    (tmp_path / "loggers.json").write_text("{")
    assert known_as("wandb", tmp_path, "f", 10) == "f"


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_missing_package_is_one_sentence_before_anything_starts(name, monkeypatch):
    monkeypatch.setattr("training.args.find_spec", lambda _: None)
    expected = rf"--train.loggers {name} needs {name}, which is not installed: bash setup.sh --extra {name} \("
    with pytest.raises(ValueError, match=expected):
        TrainArgs(loggers=("tensorboard", name))
    TrainArgs()


PROGRAM = """
import sys
from pathlib import Path
from training.loggers import Loggers
for first in (0, 2):
    log = Loggers([sys.argv[1]], Path(sys.argv[2]), first, [])
    assert log.open, "has failed"
    for step in range(first + 1, first + 3):
        log.write(step, {"loss": 1.5 / step, "loss/poems": 2.0})
        log.write(step, {"tokens_per_second": 100.0})
    log.close()
"""


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_the_real_package_without_a_network(name, tmp_path):
    """Two parts of one run, offline; needs the package (setup.sh --extra NAME)."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "config.yaml").write_text("pretrain: {optim: {lr: 0.125}}\n")
    env = os.environ | {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "HOME": str(tmp_path)}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    words = [sys.executable, "-c", PROGRAM, name, str(tmp_path)]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    known = json.loads((tmp_path / "loggers.json").read_text())[name]
    files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert files and any(known in str(path) for path in files)
    assert sum(path.stat().st_size for path in files) > 500


def test_flags_that_change_no_loss_are_free_to_change_when_a_run_goes_on():
    from fnmatch import fnmatchcase

    from cli.record import FREE

    names = {field.name for field in dataclasses.fields(TrainArgs)}
    for name in ("loggers", "prompts", "sample_tokens", "sample_minutes", "log_norms", "save", "rank_timeout"):
        assert name in names and any(fnmatchcase(f"train.{name}", free) for free in FREE)

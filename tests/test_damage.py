"""A short form of `python -m tests.damage`, and that it sees what does not hold."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from damage import kinds, table
from helpers.damage_files import HARMS, harm, judge
from helpers.forked import Child, Ended

SHORT = "kill: pretrain, Muon|kill: data_process, one|full disk: pretrain|damage: weights|damage: bins|damage: model"
SHORT += "|input: jsonl|input: parquet|records|marker: ours|marker: chatml"


def test_promises_hold(tmp_path, environment):
    """One trial each of some kinds, each in processes of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.damage",
        "--trials",
        "1",
        "--only",
        SHORT,
        "--results",
        tmp_path / "results",
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert len(rows) == len({row["kind"] for row in rows}) >= SHORT.count("|") + 1
    assert done.stdout.splitlines()[-1] == f"| all | {len(rows)} | {len(rows)} | 0 | 0 | 0 |"


def test_the_full_run_has_the_counts_that_are_promised():
    trials = {name: kind.trials for name, kind in kinds().items()}
    assert sum(trials[name] for name in trials if "(training, one process)" in kinds()[name].promise) >= 61
    assert sum(count for name, count in trials.items() if name.startswith("kill two")) >= 18


@pytest.mark.parametrize("how", HARMS)
def test_harm_changes_a_file(tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(1, 256)) * 40)
    harm(path, how, random.Random(1))
    assert not path.exists() or path.read_bytes() != bytes(range(1, 256)) * 40


@pytest.mark.parametrize(
    "status, said, differs, verdict",
    [
        (0, "", "", "held"),
        (0, "", "losses differ", "silent"),
        (0, "step_8 is damaged: x.bin", "losses differ", "held"),
        (1, "error: x.bin is cut off", "", "held"),
        (1, "error: something", "", "lost"),
        (1, "Traceback (most recent call last)", "", "traceback"),
        (-7, "", "", "traceback"),
    ],
)
def test_verdicts(status, said, differs, verdict):
    assert judge(Ended(status, said, 0, 0), Path("run/step/state/x.bin"), "", lambda: differs).verdict == verdict


def test_a_table_counts_by_promise():
    rows = [
        {"promise": "a", "verdict": "held"},
        {"promise": "b", "verdict": "silent"},
        {"promise": "a", "verdict": "held"},
    ]
    assert table(rows).splitlines()[2:] == [
        "| a | 2 | 2 | 0 | 0 | 0 |",
        "| b | 1 | 0 | 1 | 0 | 0 |",
        "| all | 3 | 2 | 1 | 0 | 0 |",
    ]


def test_a_child_says_how_it_ended(tmp_path):
    def fail():
        print("so far")
        raise SystemExit("error: no")

    ended = Child(fail, tmp_path / "said").finish()
    assert (ended.status, ended.said) == (1, "so far\nerror: no\n") and not ended.traceback
    assert Child(lambda: 1 / 0, tmp_path / "said").finish().traceback

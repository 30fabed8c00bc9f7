"""Commands of the docs whose packages `bash run.sh` does not install: each names the command that installs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli import extras

REPOSITORY = Path(__file__).parents[1]
# Runs each program as if only the packages of requirements.txt were there; prints how it ended.
PROBE = """
import importlib.util, runpy, sys
missing = {"pytest", "peft", "transformers", "psutil", "bitsandbytes", "fastapi", "uvicorn", "lm_eval"}
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in missing else find(name, *more)
programs, sys.argv = sys.argv[1:], ["program"]
for program in programs:
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        print(program, stop.code)
"""
DEV = ("tests.layouts", "tests.oracles", "tests.golden_curve", "tests.damage", "tests.fuzz")
BENCH = ("bench.decode", "bench.finetune", "bench.memory", "bench.serve", "bench.tasks", "bench.train_speed")


def test_a_missing_package_is_one_sentence():
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *DEV, *BENCH, "evaluation.harness", "serve"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    extras = (
        dict.fromkeys(DEV, "dev") | dict.fromkeys(BENCH, "bench") | {"evaluation.harness": "eval", "serve": "serve"}
    )
    assert said.keys() == extras.keys(), done.stderr[-2000:]
    for program, extra in extras.items():
        expected = (
            rf"error: \S+ needs \w+(, \w+)*( and \w+)?, which (is|are) not installed: bash setup.sh --extra {extra} "
        )
        assert re.match(expected, said[program]), said[program]
    assert done.stderr == ""


def test_the_sentence_reads_well(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if len(name) == 1 else object())
    expected = {("a",): "a, which is", ("a", "b"): "a and b, which are", ("a", "b", "c", "dd"): "a, b and c, which are"}
    for packages, names in expected.items():
        with pytest.raises(SystemExit, match=f"error: x.py needs {names} not installed: bash setup.sh --extra dev"):
            extras.need("x.py", "dev", *packages)

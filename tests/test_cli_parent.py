"""Processes end with the one that started them, and one rank of several speaks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cli import args as cli_args

REPOSITORY = Path(__file__).parents[1]

CHILD = "import os, time; from cli.parent import end_with_parent; end_with_parent(os.getppid()); print(os.getpid()); "
CHILD += "import sys; sys.stdout.flush(); time.sleep(60)"


def test_a_process_ends_soon_after_its_parent_is_killed(environment):
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    child.wait(30)  # raises TimeoutExpired where it lives on
    process.stdout.close()


def test_a_rank_that_torchrun_ends_is_silent_and_has_the_status_of_the_first(monkeypatch):
    """Both fail before PyTorch is loaded; SIGTERM, as torchrun sends it, comes after rank 0 has spoken."""
    words = [sys.executable, str(REPOSITORY / "pretrain.py"), "--no_such_flag", "1"]
    first, second = (
        subprocess.Popen(words, env=os.environ | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE) for r in "01"
    )
    said = first.communicate(timeout=30)[1].decode()
    time.sleep(1)  # now the other one is waiting, too
    second.terminate()
    assert said.startswith("error: --no_such_flag") and said.count("\n") == 1
    assert (second.communicate(timeout=30)[1], first.returncode, second.returncode) == (b"", 1, 1)


@pytest.mark.parametrize("rank, waits", [("0", False), ("1", True)])
def test_an_error_of_all_ranks_is_left_to_the_first(monkeypatch, rank, waits):
    slept = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def fail(_):
        raise ValueError("no bins")

    with pytest.raises(SystemExit, match="error: no bins"):
        cli_args.run(fail, None)
    assert bool(slept) == waits
    assert os.environ["RANK"] == rank

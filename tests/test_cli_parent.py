"""Processes end with the one that started them, and one rank of several speaks."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cli import args as cli_args

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


@pytest.mark.parametrize("rank, waits", [("0", False), ("1", True)])
def test_an_error_of_all_ranks_is_left_to_the_first(monkeypatch, rank, waits):
    slept = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", slept.append)

    def fail(_):
        raise ValueError("no bins")

    with pytest.raises(SystemExit, match="error: no bins"):
        cli_args.run(fail, None)
    assert bool(slept) == waits
    assert os.environ["RANK"] == rank

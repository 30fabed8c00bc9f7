"""Several tasks on two real processes under torchrun against one."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import finish
from helpers.tiny_training_run import quick, rows  # noqa: F401
from helpers.two_process_task_run import make


@pytest.mark.parametrize("loss", ["task_sample", "coba"])
def test_two_processes_equal_one(tmp_path, environment, loss):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).parent / "helpers" / "two_process_task_run.py")
    started = [*command, script, str(tmp_path / "two"), loss]
    status, err = finish(subprocess.Popen(started, env=environment, stderr=subprocess.PIPE, text=True))
    assert status == 0, err
    make(tmp_path / "one", loss, "single").fit()
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert {"loss/up", "loss/down", "loss/rare", "eval_loss/rare"} < set().union(*one)
    assert any("weight/up" in row for row in one) == (loss == "coba")
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4 if loss == "coba" else 2e-6)  # float32 sums; slopes of these are small

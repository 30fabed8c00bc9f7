"""Two real processes under torchrun against one, and what happens when only one of them stops or fails."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import finish
from helpers.tiny_training_run import SHAPE, toy_data, toy_trainer
from helpers.two_process_run import OPTIM, RUN

from checkpoint.directory import load_model
from distributed.backend import make_backend
from distributed.single import SingleProcess
from model import Transformer
from model_args import ModelArgs
from optim.args import OptimArgs
from optim.optimizers import build_optimizer
from training import log as training_log
from training import trainer
from training.log import read_metrics
from training.state import load_state


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(trainer, "peak_flops", lambda *_: (1e12, "not measured"))
    monkeypatch.setattr(training_log, "draw_losses", lambda *_: None)


def torchrun(folder: Path, mode: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and stderr of `two_process_run.py FOLDER MODE`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).parent / "helpers" / "two_process_run.py")
    started = [*command, script, str(folder), mode]
    return finish(subprocess.Popen(started, env=environment, stderr=subprocess.PIPE, text=True))


def rows(run: Path) -> list[dict]:
    return [row for row in read_metrics(run / "metrics.jsonl") if "mfu" not in row]


def alone(folder: Path, name: str = "alone", **changes) -> trainer.Trainer:
    torch.manual_seed(0)
    data = toy_data(folder, batch_size=12)
    return toy_trainer(folder / name, data, OPTIM, eval_data=data, **RUN | changes)


def test_two_processes_equal_one(tmp_path, environment):
    status, err = torchrun(tmp_path, "plain", environment)
    assert status == 0, err
    ours = alone(tmp_path)
    result = ours.fit()
    data = ours.data
    last = data.steps_per_epoch - 1
    assert last < RUN["max_steps"]
    assert data.batch(last).n_targets < data.batch(0).n_targets  # the ragged end of an epoch is among the steps
    assert len(rows(tmp_path / "alone")) == 21
    for one, two in zip(rows(tmp_path / "alone"), rows(tmp_path / "plain"), strict=True):
        assert two == pytest.approx(one, rel=1e-6)  # float32 with another order of sums
    one, two = (load_model(tmp_path / name / "last").state_dict() for name in ("alone", "plain"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-6, rtol=0)
    assert json.loads((tmp_path / "plain" / "result.json").read_text())["loss"] == pytest.approx(
        result["loss"], rel=1e-6
    )
    # 6 rows of each process make 3 micro-batches, and gradients are exchanged after the last of them
    assert int((tmp_path / "exchanges").read_text()) == RUN["max_steps"]
    # and no forward pass sends buffers, which a quantized model consists of
    assert [float((tmp_path / f"mark{rank}").read_text()) for rank in range(2)] == [0, 1]
    assert "FutureWarning" not in err


def test_all_stop_when_one_is_asked_and_one_alone_goes_on(tmp_path, environment):
    status, err = torchrun(tmp_path, "ask", environment)
    assert status != 0
    assert "stopped by SIGTERM after step 6: saved" in err
    state = load_state(tmp_path / "ask" / "last")
    assert state["progress"]["step"] == 6
    assert len(state["rng"]) == 2
    # a change of the number of processes is a correct re-split
    expected = alone(tmp_path).fit()
    result = alone(tmp_path, "ask").fit()
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for one, both in zip(rows(tmp_path / "alone"), rows(tmp_path / "ask"), strict=True):
        assert both == pytest.approx(one, rel=1e-5)


def test_an_error_in_one_process_ends_all(tmp_path, environment):
    status, err = torchrun(
        tmp_path, "fail", environment
    )  # within the time limit: nobody waits for the one that is gone
    assert status != 0
    assert "no space left" in err
    assert load_state(tmp_path / "fail" / "last")["progress"]["step"] == 4


# ---- which backend


def test_backends_that_cannot_run_here_say_why(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="is started by torchrun: torchrun --nproc_per_node 2"):
        make_backend("ddp", "cpu")
    with pytest.raises(
        ValueError, match=r"--train\.backend should be single or ddp or fsdp or deepspeed, found 'megatron'"
    ):
        make_backend("megatron", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--train\.backend is single, but torchrun started several processes"):
        make_backend("single", "cpu")


def test_automatic_device(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert make_backend("single", "auto").device.type == expected


# ---- one process


def one_step(max_norm: float, factor: float = 1.0) -> tuple[list[torch.Tensor], float, SingleProcess]:
    """Updates of a model whose gradients are `factor` times fixed ones; the norm that `step` reports; the backend."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**SHAPE))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, OptimArgs(optimizer="adamw", lr=0.1, eps=1.0, weight_decay=0.0))
    backend = SingleProcess(torch.device("cpu"))
    assert backend.wrap(model, optimizer) is model
    for p in model.parameters():
        p.grad = factor * torch.randn_like(p)
    norm = backend.step(max_norm)
    assert all(p.grad is None for p in model.parameters())
    return [p - old for p, old in zip(model.parameters(), before)], norm, backend


def test_clipping():
    free, norm, _ = one_step(max_norm=0.0)
    _, large, _ = one_step(max_norm=0.0, factor=3.0)
    assert large == pytest.approx(3 * norm, rel=1e-6)
    generous, same, _ = one_step(max_norm=2 * norm)
    assert same == norm
    assert all(torch.equal(a, b) for a, b in zip(free, generous))
    clipped, reported, _ = one_step(max_norm=norm, factor=3.0)
    assert reported == pytest.approx(3 * norm, rel=1e-6)  # before clipping
    for a, b in zip(free, clipped):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_skips_the_step(factor):
    updates, norm, _ = one_step(max_norm=1.0, factor=factor)
    assert not math.isfinite(norm)
    assert all((update == 0).all() for update in updates)


def test_float16_scale_grows_smaller_after_an_overflow():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**SHAPE))
    optimizer = build_optimizer(model, OptimArgs())
    backend = SingleProcess(torch.device("cpu"), fp16=True)
    backend.wrap(model, optimizer)
    for overflow in (False, True):
        scale = backend.scaler.get_scale()
        loss = sum(p.square().sum() for p in model.parameters())
        expected = 2 * math.sqrt(sum(p.double().square().sum().item() for p in model.parameters()))
        backend.backward(loss * math.inf if overflow else loss)
        norm = backend.step(0.0)
        if overflow:
            assert not math.isfinite(norm)
            assert backend.scaler.get_scale() == scale / 2
        else:
            assert norm == pytest.approx(expected, rel=1e-5)  # of the gradients without their scale


def test_sums_of_one_process():
    backend = SingleProcess(torch.device("cpu"))
    assert backend.sum([3, 0.5]) == [3, 0.5]
    assert backend.gather("x") == ["x"]
    assert (backend.rank, backend.world, backend.main) == (0, 1, True)
    assert (backend.data_rank, backend.data_world) == (0, 1)


def test_named_sums_keep_names_shapes_and_every_bit():
    class Twice(SingleProcess):
        def sum(self, values):
            return [2 * value for value in values]

    numbers = torch.randn(2, 3, dtype=torch.float64)
    values = {"loss": 0.1, "stop": True, "groups": numbers, "none": torch.zeros(2, 0, dtype=torch.float64)}
    once, twice = (backend(torch.device("cpu")).sum_named(values) for backend in (SingleProcess, Twice))
    assert list(once) == list(twice) == list(values)
    assert (once["loss"], once["stop"], twice["loss"], twice["stop"]) == (0.1, 1.0, 0.2, 2.0)
    assert once["groups"] == numbers.tolist() and twice["groups"] == (2 * numbers).tolist()
    assert once["none"] == [[], []]


def test_four_ranks_add_in_their_order_wherever_a_gradient_lies(environment):
    script = str(Path(__file__).parent / "helpers" / "bucket_order_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[true, true, true]"], done.stderr

"""What the loop does when it is asked to stop, and when things go wrong."""

import copy
import dataclasses
import math
import signal

import pytest
import torch
from helpers.tiny_training_run import Changed, losses, quick, rows, toy_data, toy_trainer, weighted  # noqa: F401

from checkpoint.directory import load_model
from dataset import IGNORE
from training.log import Clock
from training.state import TrainState, load_state
from training.trainer import TrainArgs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["batch", "forward", "backward", "save"])
def test_asked_to_stop_at_any_moment_of_a_step(tmp_path, number, moment, monkeypatch, capsys):
    data = toy_data(tmp_path)
    torch.manual_seed(0)
    toy_trainer(tmp_path / "whole", data, max_steps=9, save_interval=4).fit()
    torch.manual_seed(0)
    ours = toy_trainer(tmp_path / "run", data, max_steps=9, save_interval=4)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def ask(*_):
        if ours.state.step == (4 if moment == "save" else 5):
            signal.raise_signal(number)  # to this thread, at once: os.kill may reach another one, and later

    if moment == "batch":
        ours.data = Changed(data, lambda step, batch: ask() or batch)
    elif moment == "forward":
        ours.model.model.layers[0].register_forward_hook(ask)
    elif moment == "backward":
        ours.model.model.norm.weight.register_hook(ask)
    else:
        save = ours.checkpoints.write
        ours.checkpoints.write = lambda directory: ask() or save(directory)
    with pytest.raises(SystemExit) as stop:
        ours.fit()
    assert stop.value.code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    reached = 5 if moment == "save" else 6  # the step it was in, or the next, and no further
    assert f"stopped by {signal.Signals(number).name} after step" in capsys.readouterr().err
    assert load_state(tmp_path / "run" / "last")["progress"]["step"] == reached
    assert not (tmp_path / "run" / "result.json").exists()
    toy_trainer(tmp_path / "run", data, max_steps=9, save_interval=4).fit()
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_second_interrupt_acts_at_once(tmp_path, request):
    # what a terminal gives; a command in the background starts with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    ours = toy_trainer(tmp_path / "run", toy_data(tmp_path), max_steps=9, save_interval=2)

    def interrupt(step, batch):
        if step == 3:
            signal.raise_signal(signal.SIGINT)  # not os.kill: two that wait for delivery become one
            signal.raise_signal(signal.SIGINT)
        return batch

    ours.data = Changed(ours.data, interrupt)
    with pytest.raises(KeyboardInterrupt):
        ours.fit()
    assert load_state(tmp_path / "run" / "last")["progress"]["step"] == 2


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path, capsys):
    data = toy_data(tmp_path)
    seen, change = [], weighted({3})

    def look(step, batch):  # at the weights before each step
        seen.append(copy.deepcopy(ours.model.state_dict()))
        return change(step, batch)

    ours = toy_trainer(tmp_path / "run", Changed(data, look), max_steps=6, save_interval=1, keep=9)
    ours.fit()
    a, b, c = seen[3:]
    assert not (tmp_path / "run" / "step_00000004").exists() and (tmp_path / "run" / "step_00000005").exists()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(b[name], c[name]) for name in a)
    curve = losses(tmp_path / "run")
    assert [math.isfinite(x) for x in curve] == [True, True, True, False, True, True]
    assert "step 4: gradient norm nan; the step was skipped (1 in a row)" in capsys.readouterr().err
    assert load_state(tmp_path / "run" / "last")["progress"]["skipped"] == 0


def test_out_of_memory_says_what_to_do(tmp_path):
    def full(step, batch):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ..."
        )

    ours = toy_trainer(tmp_path / "run", Changed(toy_data(tmp_path), full))
    with pytest.raises(ValueError, match=r"^CUDA out of memory: lower --train\.micro_batch_size"):
        ours.fit()


@pytest.mark.parametrize("name", ["grad_clip", "micro_batch_size", "max_steps", "epochs", "patience"])
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} should be 0 or more, and finite, found -1"):
        TrainArgs(**{name: -1})


def test_rows_longer_than_the_model_takes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seq_len 16 is longer than the model's max_seq_len 15"):
        toy_trainer(tmp_path / "run", toy_data(tmp_path), shape={"max_seq_len": 15})


def test_twenty_such_gradients_in_a_row_end_the_run(tmp_path):
    data = toy_data(tmp_path)
    good = 4
    bad = set(range(good, 100))
    ours = toy_trainer(
        tmp_path / "run", Changed(data, weighted(bad)), max_steps=50, save_interval=2, log_interval=0, rollbacks=0
    )
    with pytest.raises(ValueError, match="20 steps in a row had no finite gradient: lower the learning"):
        ours.fit()
    assert ours.state.step == good + 19
    assert load_state(tmp_path / "run" / "last")["progress"]["step"] == good  # none is saved among steps left out
    weights = load_model(tmp_path / "run" / "last").state_dict()
    assert all(p.isfinite().all() for p in weights.values())
    # nineteen in a row do not
    bad -= {good + 19}
    toy_trainer(tmp_path / "other", Changed(data, weighted(bad)), max_steps=good + 21, log_interval=0).fit()


def test_batches_without_any_target(tmp_path):
    def change(step, batch):
        return dataclasses.replace(batch, targets=torch.full_like(batch.targets, IGNORE)) if step % 2 else batch

    ours = toy_trainer(tmp_path / "run", Changed(toy_data(tmp_path), change), max_steps=6, micro_batch_size=2)
    ours.fit()
    assert [math.isnan(x) for x in losses(tmp_path / "run")] == [False, True] * 3
    assert all(p.isfinite().all() for p in ours.model.parameters())
    # every other step of two is a mean over the targets there are
    torch.manual_seed(0)
    toy_trainer(tmp_path / "two", Changed(toy_data(tmp_path), change), max_steps=6, log_interval=2).fit()
    assert all(math.isfinite(x) for x in losses(tmp_path / "two"))


def test_held_out_data_without_any_target(tmp_path):
    data = toy_data(tmp_path)
    empty = Changed(data, lambda step, batch: dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100)))
    assert toy_trainer(tmp_path / "run", data, max_steps=2, eval_data=empty).fit()["loss"] == 0


def test_time_left_and_rate():
    state = TrainState(step=10, tokens=1000)
    clock = Clock(state, total_steps=30, flops_per_token=500.0, peak=2e6)
    clock.time -= 4.0
    state.step, state.tokens = 15, 1800
    rate, left, mfu = clock.read(state)
    assert rate == pytest.approx(200, rel=0.01)  # 800 tokens in 4 seconds
    assert left == pytest.approx(12, rel=0.01)  # 15 steps more, 0.8 seconds each
    assert mfu == pytest.approx(0.05, rel=0.01)


def test_evaluations_do_not_count_for_the_rate(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    state = TrainState(step=10, tokens=1000)
    clock = Clock(state, total_steps=30, flops_per_token=500.0, peak=2e6)
    now[0] += 4
    with clock.paused():
        now[0] += 6
    state.step, state.tokens = 15, 1800
    assert clock.read(state) == (200, 30, 0.05)  # 15 steps more: with their evaluations 2 seconds each
    now[0] += 1
    state.tokens += 100
    assert clock.read(state)[0] == 100  # the pause was before


def test_nothing_to_train_and_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        TrainArgs(max_steps=0, epochs=0.0)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="grad_clip"):
            TrainArgs(grad_clip=wrong)

"""--train.max_minutes: rates and the end follow the time, and a run that goes on has the rest of its time."""

import contextlib
import math

import pytest
from helpers.tiny_training_run import quick, toy_data, toy_trainer  # noqa: F401

from optim.args import SCHEDULES, OptimArgs
from optim.schedule import lr_factor
from training import deadline
from training.deadline import Deadline
from training.log import read_metrics
from training.state import TrainState

LONG = 10**6  # steps that no run here gets to


class Machine:
    """A clock that goes on by `seconds` in every step, by `first` in the first one of each start."""

    def __init__(self, monkeypatch, seconds, first=0.0):
        self.now, self.seconds, self.first = 1000.0, seconds, first
        monkeypatch.setattr(deadline, "monotonic", lambda: self.now)

    def train(self, trainer, stop_after=math.inf):
        """Train; each step takes its time. Ask it to stop after so many steps."""
        inner, steps, rates = trainer.backend.step, 0, []

        def step(max_norm):
            nonlocal steps
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            self.now += self.seconds + self.first * (not steps)
            steps += 1
            if steps == stop_after:
                trainer.signals.append(15)
            return inner(max_norm)

        trainer.backend.step = step
        with contextlib.suppress(SystemExit):
            trainer.fit()
        return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_at_half_the_time_the_rate_is_that_of_half_the_steps(schedule):
    args = OptimArgs(schedule=schedule, warmup_steps=10)
    for share in (0.2, 0.5, 0.8, 1.0):
        in_time = lr_factor(20, LONG, args, share)
        planned = lr_factor(round(share * LONG), LONG, args)
        assert in_time == pytest.approx(lr_factor(20, LONG, args) if schedule == "inverse_sqrt" else planned, abs=1e-4)
        # where the steps are further than the time, the time changes nothing
        assert lr_factor(900, 1000, args, share / 2) == lr_factor(900, 1000, args)


def test_the_warm_up_ends_after_its_steps_or_a_tenth_of_the_time():
    args = OptimArgs(warmup_steps=100)
    assert lr_factor(9, LONG, args, 0.001) == 0.1
    assert lr_factor(9, LONG, args, 0.05) == 0.5
    assert lr_factor(9, LONG, args, 0.1) == lr_factor(99, LONG, args, 0.01) == 1.0


def test_the_time_ends_a_run_and_the_rate_falls_to_its_end(tmp_path, monkeypatch):
    machine = Machine(monkeypatch, seconds=6.0, first=30.0)
    optim = OptimArgs(optimizer="adamw", lr=0.01, schedule="linear", warmup_steps=3)
    trainer = toy_trainer(tmp_path / "run", toy_data(tmp_path), optim, max_steps=LONG, max_minutes=2.0)
    rates = machine.train(trainer)
    # 30 seconds to compile, and 15 steps of 6 seconds: the first one does not count for the schedule
    assert trainer.state.step == len(rates) == 15 and trainer.state.seconds == 120
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    # the rate falls along a line to the end of the time: the last step begins when 1/14 of it is left
    assert rates[3:] == pytest.approx([0.01 * (14 - i) / 14 for i in range(2, 14)], abs=1e-5)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 15 and trainer.nothing_to_do


def test_steps_end_a_fast_run_and_its_rates_are_those_without_a_limit(tmp_path, monkeypatch):
    machine = Machine(monkeypatch, seconds=0.001)
    data = toy_data(tmp_path)
    free = machine.train(toy_trainer(tmp_path / "free", data, max_steps=30))
    assert machine.train(toy_trainer(tmp_path / "limited", data, max_steps=30, max_minutes=5.0)) == free


def test_a_run_that_goes_on_has_the_rest_of_its_time(tmp_path, monkeypatch):
    machine, data = Machine(monkeypatch, seconds=10.0), toy_data(tmp_path)
    changes = {"max_steps": LONG, "max_minutes": 2.0}
    assert len(machine.train(toy_trainer(tmp_path / "run", data, **changes), stop_after=5)) == 5
    machine.now += 1e5  # what passes between the two does not count
    second = toy_trainer(tmp_path / "run", data, **changes)
    assert second.state.seconds == 50
    assert len(machine.train(second)) == 7 and second.state.step == 12


def test_fewer_steps_are_announced_once():
    limit = Deadline(10.0)
    state = TrainState(step=2, seconds=70.0, first_step_seconds=60.0)  # 10 seconds a step
    assert limit.fewer_steps(state, 1000) is None  # too early
    state.step, state.seconds = 4, 90.0
    said = limit.fewer_steps(state, 1000)
    assert said.startswith("1,000 steps would take 167.5 minutes here: about 55 are trained in the 10 of")
    assert limit.fewer_steps(state, 1000) is None
    assert Deadline(10.0).fewer_steps(state, 55) is None and Deadline(0.0).fewer_steps(state, 1000) is None
    assert Deadline(0.0).left(state) == math.inf

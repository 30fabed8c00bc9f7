"""The state of a run: sums and averages, the best, and how a checkpoint holds it."""

import math
import random

import pytest
import torch
from helpers.tiny_training_run import quick, rows, toy_data, toy_trainer  # noqa: F401

from training.checksums import check_model
from training.generators import rng_state, set_rng_state
from training.state import Diverged, TrainState, load_state

NO_GROUPS = [[], []]


def groups(*losses_and_targets: tuple[float, float]) -> list[list[float]]:
    return [list(column) for column in zip(*losses_and_targets)]


def test_averages_are_over_all_targets_since_the_last_reset():
    state = TrainState()
    state.add(1.0, 100, 10, 30.0, groups((20.0, 4), (10.0, 6), (0.0, 0)), {"margin": 5.0})
    state.add(1.0, 100, 30, 10.0, groups((4.0, 12), (6.0, 18), (0.0, 0)), {"margin": 3.0})
    assert state.averages(["a", "b", "none"]) == {"loss": 1.0, "loss/a": 1.5, "loss/b": 16 / 24, "margin": 0.2}
    state.reset()
    assert (state.step, state.tokens) == (2, 200)
    assert math.isnan(state.averages(["a", "b", "none"])["loss"])
    state.add(1.0, 100, 2, 8.0, groups((8.0, 2), (0.0, 0), (0.0, 0)), {"margin": 1.0})
    assert state.averages(["a", "b", "none"]) == {"loss": 4.0, "loss/a": 4.0, "margin": 0.5}


def test_steps_that_were_skipped_are_left_out_and_twenty_in_a_row_are_an_error():
    state = TrainState()
    state.add(1.0, 10, 1, 2.0, NO_GROUPS, {})
    for _ in range(19):
        state.add(math.nan, 10, 1, math.nan, NO_GROUPS, {})
    assert (state.skipped, state.step, state.tokens) == (19, 20, 200)
    assert state.averages([]) == {"loss": 2.0}
    state.add(1.0, 10, 1, 4.0, NO_GROUPS, {})
    assert state.skipped == 0 and state.averages([]) == {"loss": 3.0}
    for _ in range(19):
        state.add(math.inf, 10, 1, 0.0, NO_GROUPS, {})
    with pytest.raises(Diverged, match=r"20 steps in a row .* lower the learning rate \(--optim\.lr"):
        state.add(math.inf, 10, 1, 0.0, NO_GROUPS, {})


def test_the_best_and_the_evaluations_since():
    state = TrainState()
    judged = []
    for step, value in enumerate([3.0, 2.0, 2.0, math.nan, 1.0], 1):
        state.step = step
        judged.append((state.judge(value), state.evals_since_best, state.evaluated))
    assert judged == [(True, 0, 1), (True, 0, 2), (False, 1, 3), (False, 2, 4), (True, 0, 5)]
    state.forget_best("task_mean")
    assert (state.best, state.evals_since_best, state.evaluated, state.metric) == (math.inf, 0, -1, "task_mean")


OLD = {  # what older versions wrote under the key "progress"
    **{"step": 7, "tokens": 700, "best": 2.5, "evals_since_best": 1, "evaluated": 5, "loss_sum": 1.5, "targets": 3},
    **{"skipped": 2, "group_losses": [1.0, 0.5], "group_targets": [2.0, 1.0], "measures": {"margin": 6.0}},
    "metric": "task_mean",
}
NEW = {
    "log": None,
    "avoid": [],
    "recent": [],
    "rollbacks": 0,
    "seconds": 0.0,
    "first_step_seconds": 0.0,
}  # what older versions did not have


def test_states_of_older_versions_are_read_and_written_as_they_were():
    state = TrainState(**OLD)
    assert (state.step, state.best, state.metric, state.measures) == (7, 2.5, "task_mean", {"margin": 6.0})
    assert state.averages(["a", "b"]) == {"loss": 0.5, "loss/a": 0.5, "loss/b": 0.5, "margin": 2.0}
    assert vars(state) == OLD | NEW
    assert TrainState(**{"step": 3}).measures == {}


def test_a_run_goes_on_from_a_state_of_an_older_version(tmp_path):
    """It has the moments by position, and fewer values; the sums of its steps count in the next line of the log."""
    data = toy_data(tmp_path)
    torch.manual_seed(0)
    toy_trainer(tmp_path / "whole", data, max_steps=9, log_interval=3).fit()
    torch.manual_seed(0)
    toy_trainer(tmp_path / "cut", data, max_steps=9, log_interval=3, save_interval=2, keep=9).fit()
    for link in ("last", "best"):
        (tmp_path / "cut" / link).unlink()
    (tmp_path / "cut" / "last").symlink_to("step_00000004")
    stored = load_state(tmp_path / "cut" / "last")
    assert stored.keys() == {"progress", "moments", "rng", "scaler", "identity"}
    assert stored["progress"].keys() == OLD.keys() | NEW.keys()
    like = toy_trainer(tmp_path / "like", data, max_steps=9)
    old = {name: value for name, value in stored.items() if name != "moments"}
    old["progress"] = {name: value for name, value in stored["progress"].items() if name in OLD}
    old["optimizer"] = like.optimizer.by_position(like.model, stored["moments"])
    files = tmp_path / "cut" / "step_00000004" / "training_state"
    for path in files.iterdir():
        path.unlink()
    torch.save(old, files / "state.pt")
    assert stored["progress"]["targets"] == data.batch(3).n_targets  # one step since the line of step 3
    toy_trainer(tmp_path / "cut", data, max_steps=9, log_interval=3, save_interval=2).fit()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_random_generators_go_on_where_they_were():
    state = rng_state(torch.device("cpu"))
    expected = torch.rand(3).tolist(), random.random(), random.gauss(0, 1)
    set_rng_state(state, torch.device("cpu"))
    assert (torch.rand(3).tolist(), random.random(), random.gauss(0, 1)) == expected


def test_a_model_is_compared_with_its_sums(tmp_path, capsys):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=1).fit()
    model = tmp_path / "run" / "last"
    check_model(model)
    config, weights = model / "generation_config.json", model / "model.safetensors"
    config.write_text("{}\n")
    check_model(model)
    assert "generation_config.json is missing or not what was saved" in capsys.readouterr().err
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    check_model(model, most_bytes=8)
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or not what was saved .* copy it again"):
        check_model(model)
    (model / "training_state" / "sha256.json").unlink()
    check_model(model)


@pytest.mark.parametrize("harm", [b"9", b"", None])
def test_a_damaged_result_is_named_and_made_again(tmp_path, harm, capsys):
    data, result = toy_data(tmp_path), tmp_path / "run" / "result.json"
    toy_trainer(tmp_path / "run", data, max_steps=2, eval_data=data).fit()
    whole = result.read_bytes()
    assert toy_trainer(tmp_path / "run", data, max_steps=2, eval_data=data).nothing_to_do
    if harm is None:
        result.unlink()
    else:
        result.write_bytes(whole[:9] + harm + whole[10:] if harm else harm)
    again = toy_trainer(tmp_path / "run", data, max_steps=2, eval_data=data)
    assert not again.nothing_to_do
    capsys.readouterr()
    again.fit()
    assert result.read_bytes() == whole
    assert ("result.json is not what the run wrote" in capsys.readouterr().err) == (harm is not None)
    (tmp_path / "run" / "result.sha256").unlink()  # a run of an older version
    assert toy_trainer(tmp_path / "run", data, max_steps=2, eval_data=data).nothing_to_do

"""Warnings of a run: each is given for a record that deserves it, and for no healthy one."""

import math
import random
from pathlib import Path

import pytest

from reporting.findings import findings, is_loop, spike_steps
from reporting.record import Run

TRAINING = {"steps": 900, "steps_per_epoch": 300, "held_out_positions": 90_000, "vocab_size": 4800, "device": "cpu"}
SETTINGS = {"optim.warmup_steps": 20, "train.grad_clip": 1.0, "init_from": None}


def rows(**changes) -> list[dict]:
    """A healthy run of 60 lines; changes: name of a metric -> function of the number of the line and of its value."""
    rng = random.Random(0)
    found = [{"step": 1, "first_step": math.log(4800) + 0.05}]
    for n in range(1, 61):
        loss = 3 + 5 * math.exp(-n / 10)
        row = {"loss": loss + rng.gauss(0, 0.05), "grad_norm": rng.uniform(0.3, 0.9), "tokens_per_second": 1000.0}
        if n % 10 == 0:
            row["eval_loss"] = loss + 0.1
        row = {name: changes[name](n, value) if name in changes else value for name, value in row.items()}
        found.append({"step": 15 * n} | row)
    return found


def run(kind="pretrain", metrics=None, training=None, settings=None, **more) -> Run:
    record = {"training": TRAINING | (training or {}), "data": more.pop("data", []), **more.pop("record", {})}
    return Run(Path("r"), kind, SETTINGS | (settings or {}), record, rows() if metrics is None else metrics, **more)


def titles(one: Run) -> list[str]:
    return [each.title for each in findings(one)]


def test_a_healthy_run_has_none():
    assert titles(run()) == [] and titles(run("fine_tuning", settings={"objective": "sft"})) == []


SICK = {
    "Not finite": {"metrics": rows(loss=lambda n, v: math.nan if n == 30 else v)},
    "First loss": {"metrics": [{"step": 1, "first_step": 14.0}, *rows()[1:]]},
    "Warm-up": {"training": {"steps": 20}},
    "Spikes": {"metrics": rows(loss=lambda n, v: v + 2 * (n == 40))},
    "Not learning": {"metrics": rows(loss=lambda n, v: 8.4 + 0.01 * (n % 3))},
    "Worse than chance": {"metrics": rows(eval_loss=lambda n, v: 9.1)},
    "Overfitting": {"metrics": rows(eval_loss=lambda n, v: v + max(0, n - 30) / 50)},
    "Gap": {"metrics": rows(loss=lambda n, v: v - n / 25)},
    "Slower": {"metrics": rows(tokens_per_second=lambda n, v: v if n < 30 else 200.0)},
    "Held-out data": {"training": {"held_out_positions": 1200}},
    "Epochs": {"training": {"steps_per_epoch": 100}},
    "Clipping": {"metrics": rows(grad_norm=lambda n, v: v + 5)},
    "Files": {"problems": ["run.json is missing"]},
    "Samples": {"samples": [{"step": 9, "text": " "}, {"step": 9, "text": ""}]},
    "Changed settings": {"record": {"changes": [{"after_step": 5, "settings": {"optim.lr": [0.1, 0.2]}}]}},
    "Idle GPU": {"training": {"device": "cuda"}, "metrics": [r | {"mfu": 0.02} for r in rows()]},
}


@pytest.mark.parametrize("title", SICK)
def test_each_illness_is_named(title):
    assert title in titles(run(**SICK[title]))


def test_the_gravest_stand_first():
    one = run(metrics=rows(loss=lambda n, v: math.inf if n == 3 else v, grad_norm=lambda n, v: v + 5))
    assert [each.level for each in findings(one)] == ["error", "note"]


def test_what_is_said_has_the_numbers():
    (found,) = findings(run(**SICK["Overfitting"]))[:1]
    assert "lowest at step 450" in found.text and "`best` is the model of that step" in found.text
    (found,) = findings(run(**SICK["First loss"]))
    assert "14.00" in found.text and "ln 4,800 = 8.48" in found.text
    (found,) = findings(run(**SICK["Changed settings"]))
    assert found.text == "After step 5: --optim.lr 0.2 (before: 0.1)."


@pytest.mark.parametrize("first, named", [(8.4, False), (8.9, False), (5.0, True), (12.0, True)])
def test_the_first_loss_of_a_new_model_is_near_the_logarithm_of_its_vocabulary(first, named):
    metrics = [{"step": 1, "first_step": first}, *rows()[1:]]
    assert ("First loss" in titles(run(metrics=metrics))) == named
    assert "First loss" not in titles(run(metrics=metrics, settings={"init_from": "out/x"}))  # it goes on
    assert "First loss" not in titles(run("fine_tuning", metrics=metrics))


def test_pairs_that_are_told_apart_no_better():
    flat = [{"step": n, "loss": 0.6931} for n in range(1, 31)]
    (found,) = findings(run("fine_tuning", metrics=flat, settings={"objective": "dpo"}))
    assert found.title == "Not learning" and "ln 2" in found.text


def test_few_conversations_and_none():
    entry = {"name": "chats", "held_out": True, "conversations": 12, "tokens": 50_000}
    assert titles(run("fine_tuning", data=[entry])) == ["Held-out data"]
    assert titles(run("fine_tuning", data=[entry | {"conversations": 120}])) == []
    assert titles(run("fine_tuning", training={"held_out_positions": None})) == ["Held-out data"]


def test_records_that_are_left_out():
    entry = {"name": "chats", "held_out": False, "conversations": 100, "beyond": 30, "broken": 1}
    assert titles(run("fine_tuning", data=[entry])) == ["Records left out"]
    assert titles(run("fine_tuning", data=[entry | {"beyond": 3}])) == []


def test_a_noisy_curve_has_no_spikes():
    rng = random.Random(1)
    for _ in range(20):
        values = [3 + 5 * math.exp(-n / 10) + rng.gauss(0, 0.1) for n in range(300)]
        assert spike_steps(range(300), values) == []
        values[200] += 1.5
        assert spike_steps(range(300), values) == [200]


def test_an_empty_record_and_an_old_one_have_no_warnings_of_what_they_do_not_say():
    assert titles(Run(Path("r"), "pretrain")) == []
    assert titles(Run(Path("r"), "pretrain", SETTINGS, {}, rows())) == []


def test_a_text_that_goes_in_circles():
    assert is_loop("the cat sat on the mat. " * 10) and not is_loop("the cat sat")
    assert not is_loop("In 1995 the small cat sleeps near the fence, and the old dog barks at a boat on the river.")

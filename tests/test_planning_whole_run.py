"""The time of a whole run, from steps that the test makes up."""

from pathlib import Path

import hardware
from planning import whole_run
from planning.measure import Times
from training import precision

CONFIGS = Path(__file__).parents[1] / "configs"


def foreseen(monkeypatch, preset, slower=1.0, compiler=True, bf16=False):
    """Stages of a preset on a machine where a micro-batch takes a second and an update a quarter of one."""
    monkeypatch.setattr(whole_run, "loop_seconds", lambda: slower * whole_run.LOOP_SECONDS)
    monkeypatch.setattr(whole_run, "times_of", lambda shapes, step, seconds: [Times(1.0, 0.25)])
    monkeypatch.setattr(hardware, "choose_device", lambda _: hardware.torch.device("cpu"))
    monkeypatch.setattr(precision, "can_compile", lambda _: compiler)
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: bf16)
    return whole_run.stages(CONFIGS / f"{preset}.yaml")


def test_steps_compilation_and_what_is_no_training(monkeypatch):
    plain = foreseen(monkeypatch, "tiny", compiler=False)
    assert plain == {"tokenizer": 29, "data": 12, "eval": 95, "pretrain": 1100 * 1.25 + 8, "sft": 600 * 1.25 + 8}
    compiled = foreseen(monkeypatch, "tiny")
    assert compiled["pretrain"] == 1100 * 1.25 * 0.75 + 6 * 10 + 8  # 10 seconds for each of 6 layers
    assert foreseen(monkeypatch, "tiny", bf16=True)["sft"] == 600 * 1.25 * 0.57 + 6 * 10 + 8
    slow = foreseen(monkeypatch, "tiny", slower=3.0)
    assert slow["tokenizer"] == 87 and slow["pretrain"] - compiled["pretrain"] == 2 * (60 + 8)
    poet = foreseen(monkeypatch, "poet", compiler=False)  # the same corpus
    assert poet == plain | {"pretrain": 5000 * 1.25 + 8, "sft": 1200 * 1.25 + 8}


def test_nothing_is_said_where_the_number_of_steps_depends_on_the_data(monkeypatch):
    assert foreseen(monkeypatch, "bilingual") == {}


def test_plain_python_takes_some_time():
    assert 0.001 < whole_run.loop_seconds() < 60

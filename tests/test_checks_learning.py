"""`--check True` names the fault that a test has planted in a run that is about to start."""

import dataclasses
import json
import sys

import pytest
import torch
from helpers.patients import QUESTIONS, save_chats, save_data, save_patient
from helpers.tiny_training_run import Changed, quick, toy_data, toy_trainer  # noqa: F401
from torch import nn

import fine_tuning
import pretrain
from checks import learning, machine
from checks.check import FAULT, OK, WARNING
from cli.args import parse
from dataset import IGNORE
from optim.args import OptimArgs
from training.args import TrainArgs

OPTIM = OptimArgs(lr=0.01, muon_lr=0.01)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch, quick):  # noqa: F811
    monkeypatch.setattr(machine, "peak_flops", lambda *_: (1e12, "not measured"))
    monkeypatch.setattr(learning, "STEPS", 12)


def examined(trainer, new: bool = True) -> dict[str, str]:
    """Level by name of what is not OK, but for the threads of this machine."""
    found = learning.training_checks(trainer, new)
    return {each.name: each.level for each in found if each.level != OK and each.name != "threads"}


def test_a_healthy_run_has_no_fault(tmp_path):
    trainer = toy_trainer(tmp_path / "run", toy_data(tmp_path), OPTIM)
    found = learning.training_checks(trainer, new=True)
    names = {"ids", "targets", "first loss", "causality", "one batch", "micro-batch", "disk"}
    assert {each.name for each in found} >= names
    assert [each for each in found if each.level != OK and each.name != "threads"] == []
    assert not (tmp_path / "run").exists()


def test_targets_that_are_not_shifted(tmp_path):
    data = Changed(toy_data(tmp_path), lambda step, batch: dataclasses.replace(batch, targets=batch.tokens))
    assert examined(toy_trainer(tmp_path / "run", data, OPTIM)) == {"targets": FAULT}


def test_nothing_is_trained(tmp_path):
    def masked(step, batch):
        return dataclasses.replace(batch, targets=torch.full_like(batch.targets, IGNORE))

    data = Changed(toy_data(tmp_path), masked)
    assert examined(toy_trainer(tmp_path / "run", data, OPTIM))["trained positions"] == FAULT


def test_ids_of_a_larger_vocabulary(tmp_path):
    assert examined(toy_trainer(tmp_path / "run", toy_data(tmp_path), OPTIM, {"vocab_size": 20}))["ids"] == FAULT


@pytest.mark.parametrize("factor, level", [(1000, FAULT), (1e-4, FAULT), (1e-2, WARNING)])
def test_a_rate_that_is_far_off(tmp_path, factor, level):
    optim = OptimArgs("adamw", lr=0.01 * factor)
    assert examined(toy_trainer(tmp_path / "run", toy_data(tmp_path), optim)) == {"one batch": level}


def test_initial_weights_that_are_too_large(tmp_path):
    trainer = toy_trainer(tmp_path / "run", toy_data(tmp_path), OPTIM)
    nn.init.normal_(trainer.model.lm_head.weight, std=2.0)
    assert examined(trainer)["first loss"] == FAULT


def test_a_model_that_goes_on_and_is_no_better_than_a_guess(tmp_path):
    assert examined(toy_trainer(tmp_path / "run", toy_data(tmp_path), OPTIM), new=False) == {"first loss": WARNING}


def test_a_model_that_sees_later_tokens(tmp_path):
    trainer = toy_trainer(tmp_path / "run", toy_data(tmp_path), OPTIM)
    trainer.model.model.embed_tokens.register_forward_hook(lambda _, __, x: x + 3 * x.mean(1, keepdim=True))
    assert examined(trainer)["causality"] == FAULT


def test_a_module_that_the_loss_does_not_reach(tmp_path):
    trainer = toy_trainer(tmp_path / "run", toy_data(tmp_path), OPTIM)
    trainer.model.model.layers[1].mlp.register_forward_hook(lambda _, __, x: x.detach())
    (found,) = [each for each in learning.training_checks(trainer, True) if each.name == "living gradients"]
    assert found.level == WARNING and "layers.1.mlp" in found.found


def test_a_weight_that_is_not_finite(tmp_path):
    trainer = toy_trainer(tmp_path / "run", toy_data(tmp_path), OPTIM)
    trainer.model.model.norm.weight.data[3] = float("nan")
    found = examined(trainer)
    assert (found["first loss"], found["finite gradients"], found["one batch"]) == (FAULT, FAULT, FAULT)


def test_memory_that_does_not_do(tmp_path, monkeypatch):
    sizes = iter((2 * 10**6, 5 * 10**6))
    monkeypatch.setattr(learning, "peak", lambda device, work: work() or next(sizes))
    monkeypatch.setattr(learning, "free_bytes", lambda: 10**7)
    trainer = toy_trainer(tmp_path / "run", toy_data(tmp_path), OPTIM)
    found = learning.memory(trainer, trainer.backend.wrap(trainer.model, trainer.optimizer))
    assert found[0].level == FAULT and "for 6 rows" in found[0].found  # 2 MB and 5 times 3 MB


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_of_memory_is_measured():
    def work():
        torch.ones(32 * 2**20).sum()  # 128 MiB for a moment

    assert 120 * 2**20 < learning.peak(torch.device("cpu"), work) < 160 * 2**20


# ---- through the scripts


def check(script, *words: object) -> dict:
    """What `main` of a training returns with --check True."""
    small = "--check True --train.device cpu --train.dtype fp32 --data.seq_len 64 --data.batch_size 6"
    return script.main(parse(script.Args, script.__name__, [*small.split(), *map(str, words)]))


def test_both_trainings_look_and_do_not_train(tmp_path, capsys):
    model, tokenizer = save_patient(tmp_path)
    save_data(tmp_path / "data", tokenizer)
    chats = save_chats(tmp_path / "chats.jsonl", QUESTIONS)
    pairs = [{"prompt": q, "chosen": q[::-1], "rejected": q} for q in QUESTIONS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    shape = ("--model.dim", 32, "--model.n_layers", 2, "--model.n_heads", 2)
    run = ("--data.dir", tmp_path / "data", "--out", tmp_path / "run", *shape)
    assert check(pretrain, *run)["worst"] != FAULT
    tune = ("--init_from", model, "--out", tmp_path / "run")
    found = check(fine_tuning, *tune, "--data", chats)
    assert {"one batch", "first loss"} <= {each["name"] for each in found["checks"]} and found["worst"] == WARNING
    assert check(fine_tuning, *tune, "--data", chats, "--lora.method", "lora", "--optim.lr", 0.02)["worst"] != FAULT
    dpo = ("--data", tmp_path / "pairs.jsonl", "--objective", "dpo", "--data.packing", "none")
    assert check(fine_tuning, *tune, *dpo)["worst"] != FAULT
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        check(pretrain, *run, "--optim.lr", 9, "--optim.muon_lr", 9)
    assert stop.value.code == 1 and "FAULT    one batch" in capsys.readouterr().out
    assert not (tmp_path / "run" / "last").exists() and not (tmp_path / "run" / "config.yaml").exists()


def test_a_check_goes_without_several_processes_and_without_samples():
    for script, more in ((pretrain, {"train": TrainArgs(backend="ddp")}), (fine_tuning, {"show": 3})):
        with pytest.raises(ValueError, match="check True"):
            script.Args(check=True, **more)

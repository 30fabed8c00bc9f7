"""The flags of fine_tuning.py that go together only."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import fine_tuning
from cli.args import parse
from lora.spec import LoraArgs
from tuning.args import DataArgs, PreferenceArgs

TWO = (Path("a"), Path("b"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"base": "nf4"}, "--lora.base nf4 needs --lora.method lora, rslora, dora or pissa, found none: only adapters"),
        ({"train_embed_norm": True}, "--lora.train_embed_norm True needs --lora.method lora, rslora"),
        ({"r": 4}, "--lora.r 4 needs --lora.method lora, rslora, dora or pissa, found none"),
        ({"r": 4, "alpha": 2.0}, "--lora.r 4 and --lora.alpha 2.0 need --lora.method lora, rslora"),
        (
            {"method": "lora", "double_quant": False},
            "--lora.double_quant False needs --lora.base nf4 or fp4, found full: it quantizes their scales; remove it",
        ),
        (
            {"method": "pissa", "base": "int8"},
            "--lora.base int8 needs --lora.method none, lora, rslora or dora, found pissa: pissa changes the base",
        ),
    ],
)
def test_settings_of_adapters(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fine_tuning.Args(lora=LoraArgs(**settings))


@pytest.mark.parametrize("name, kinds", [("add_tokens", "lora"), ("add_special_tokens", "pissa")])
def test_new_tokens_come_before_an_adapter(name, kinds):
    with pytest.raises(
        ValueError, match=f"--{name} needs --lora.method none, found {kinds}: .* --model base --out DIR"
    ):
        fine_tuning.Args(lora=LoraArgs(kinds), init_from=Path("base"), **{name: ("x",)})


@pytest.mark.parametrize("setting", ["label_smoothing", "sft_weight"])
def test_settings_of_another_objective(setting):
    preference = PreferenceArgs(**{setting: 0.1})
    fine_tuning.Args(objective="dpo", preference=preference)
    for objective in ("sft", "orpo"):
        with pytest.raises(ValueError, match=rf"{setting} 0\.1 needs --objective dpo.*, found {objective}"):
            fine_tuning.Args(objective=objective, preference=preference)


def test_a_setting_that_a_loss_adds_is_in_the_checkpoints_of_that_loss_only(monkeypatch):
    @dataclass(frozen=True)
    class More(PreferenceArgs):
        gamma: float = 1.0

    args = SimpleNamespace(objective="orpo", preference=More(0.5))
    before = {"beta": 0.5, "label_smoothing": 0.0, "sft_weight": 0.0}
    assert fine_tuning.settings_of_objective(args) == before
    monkeypatch.setitem(fine_tuning.OBJECTIVES, "orpo", ("beta", "gamma"))
    assert fine_tuning.settings_of_objective(args) == before | {"gamma": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": LoraArgs("lora", r=4, base="nf4", double_quant=False, train_embed_norm=True)},
        {"lora": LoraArgs("pissa")},
        {"add_tokens": ("x",), "add_special_tokens": ("<y>",)},
        {"objective": "orpo", "preference": PreferenceArgs(0.5)},
        {"objective": "dpo", "data": DataArgs(packing="none")},
        {"data": DataArgs(TWO, loss="coba", coba_tau=2.0)},
        {"data": DataArgs(TWO, loss="task_sample", weights=(1.0, 2.0), temperature=2.0, train_on="last")},
    ],
)
def test_flags_that_go_together(settings):
    fine_tuning.Args(**settings)


@pytest.mark.parametrize(
    "words", [["--lora.r", "8"], ["--r", "8"], ["--lora.alpha=16"], ["--lora.targets", "attention,mlp"]]
)
def test_a_setting_of_adapters_without_a_method_is_refused_also_at_its_default(words):
    with pytest.raises(SystemExit, match=r"needs --lora\.method lora, .*, found none: .* all weights are trained"):
        parse(fine_tuning.Args, "fine_tuning", words)
    parse(fine_tuning.Args, "fine_tuning", [*words, "--lora.method", "lora"])
    fine_tuning.Args()  # nothing of an earlier command line is left

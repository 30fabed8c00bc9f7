"""Adapters against PEFT on transformers' model: the same logits and gradients from the same files, both ways.

Everything runs in float64, where 1e-10 leaves no room for another formula; files are in the dtype of the adapters.
"""

import json

import pytest
import torch
from helpers.lora_models import hf_model, our_model, save_as_hf, shake, some_tokens

from checkpoint import peft as our_peft
from lora import adapters
from lora.adapters import LoraArgs, LoraSpec

peft = pytest.importorskip("peft")

ALL = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
VARIANTS = {
    "lora": LoraArgs("lora", r=3),
    "rslora": LoraArgs("rslora", r=3, targets="mlp"),
    "dora": LoraArgs("dora", r=3),
    "pissa": LoraArgs("pissa", r=3),
    "embedding": LoraArgs("lora", r=3, targets="embedding,q_proj"),
    "head": LoraArgs("lora", r=3, targets="head"),
    "dora head": LoraArgs("dora", r=3, targets="head,v_proj"),
    "regex": LoraArgs("lora", r=3, targets=r".*layers\.1\.(self_attn\.[qv]_proj|mlp\.up_proj)"),
    "train_embed_norm": LoraArgs("lora", r=3, targets="attention", train_embed_norm=True),
    "dora train_embed_norm": LoraArgs("dora", r=3, targets="linear", train_embed_norm=True),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ours_load_in_peft(variant, tied, tmp_path):
    args = VARIANTS[variant]
    if tied and ("head" in args.targets or "embedding" in args.targets):
        pytest.skip("refused, as test_lora.py shows")
    model = our_model(tied)
    save_as_hf(model, tmp_path / "base")
    adapters.apply(model, args)
    shake(model)
    our_peft.save(tmp_path / "adapter", model)
    theirs = peft.PeftModel.from_pretrained(hf_model(tmp_path / "base"), tmp_path / "adapter").double()
    tokens = some_tokens()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-10)


PEFT_CONFIGS = {
    "lora": {"target_modules": ["q_proj", "up_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True},
    "dora": {"target_modules": list(ALL), "use_dora": True},
    "rank-stable dora": {"target_modules": list(ALL), "use_dora": True, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.0\..*(gate|down)_proj"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm", "lm_head"]},
    "pissa": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("variant", PEFT_CONFIGS)
def test_theirs_load_here(variant, tmp_path):
    model = our_model().float()  # peft makes a PiSSA in float32 at the most
    save_as_hf(model, tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **PEFT_CONFIGS[variant])
    theirs = peft.get_peft_model(hf_model(tmp_path / "base").float(), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    our_peft.load(model, tmp_path / "adapter")
    tokens = some_tokens()
    # float32: sums of 40 products of weights of size 0.2 (norms of 1) through two layers
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=2e-5)
    if variant != "pissa":  # whose base was changed in float32
        torch.testing.assert_close(model.double()(tokens), theirs.double()(tokens).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
def test_gradients_equal_pefts(method, head, tmp_path):
    """DoRA's too, whose norm is a constant; through our loss, which reads the head's weight, and through theirs."""
    model = our_model()
    save_as_hf(model, tmp_path / "base")
    adapters.apply(model, LoraArgs(method, r=3, targets="attention,mlp" + ",head" * head))
    shake(model)
    our_peft.save(tmp_path / "adapter", model)
    base = hf_model(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).double()
    tokens = some_tokens()
    loss, count = model(tokens[:, :-1], tokens[:, 1:])
    (loss / count).backward()
    theirs(tokens, labels=tokens).loss.double().backward()
    wanted = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    ours = {name.replace(".lora.default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(ours) == len(wanted) == (15 if head else 14) * (3 if method == "dora" else 2)
    for name, grad in ours.items():
        suffix = ".weight"  # in memory, peft's magnitude vector has one too
        # transformers makes the loss in float32
        torch.testing.assert_close(grad, wanted[f"base_model.model.{name}{suffix}"], rtol=1e-5, atol=1e-7)


def test_peft_starts_pissa_from_the_same_matrices(tmp_path):
    """Singular vectors have no sign of their own, but both ask the same routine; compare what does not depend on it."""
    model = our_model().float()
    save_as_hf(model, tmp_path / "base")
    config = peft.LoraConfig(r=5, lora_alpha=10, target_modules=["gate_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(hf_model(tmp_path / "base").float(), config).base_model.model
    adapters.inject(model, LoraSpec(5, 10, targets=("gate_proj",), pissa=True))
    for layer in range(2):
        here = model.model.layers[layer].mlp.gate_proj
        there = theirs.model.layers[layer].mlp.gate_proj
        delta = there.get_delta_weight("default")
        torch.testing.assert_close(here.lora["default"].delta(), delta, rtol=0, atol=1e-5)
        torch.testing.assert_close(here.weight, there.base_layer.weight, rtol=0, atol=1e-5)


def test_the_config_names_the_same_layers_in_few_words(tmp_path):
    model = our_model()
    adapters.apply(model, LoraArgs("lora", r=2, targets="attention", train_embed_norm=True))
    our_peft.save(tmp_path, model, base="somebody/model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["modules_to_save"] == ["embed_tokens", "input_layernorm", "norm", "post_attention_layernorm"]
    assert config["base_model_name_or_path"] == "somebody/model"
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 16.0)

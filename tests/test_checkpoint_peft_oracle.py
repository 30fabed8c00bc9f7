"""Adapters against PEFT on transformers' model: the same logits and gradients from the same files, both ways.

Everything runs in float64, where 1e-10 leaves no room for another formula; files are in the dtype of the adapters.
"""

import json

import pytest
import torch
from helpers.lora_models import hf_model, our_model, save_as_hf, shake, some_tokens

from checkpoint import peft as our_peft
from checkpoint.directory import load_model
from convert import Merge, merge
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


TABLES = {  # settings after which PEFT writes tables of the vocabulary, under one name or several
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "saved and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [1, 3, 36]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 3]}},
    "new rows only": {},
    "low rank": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("added", [0, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", TABLES)
def test_tables_of_the_vocabulary_load_here(variant, tied, added, tmp_path):
    """Whole or in part, and after tokens were added: what is merged here says what PEFT's model says."""
    model = our_model(tied).float()
    save_as_hf(model, tmp_path / "base")
    grown = hf_model(tmp_path / "base").float()
    if added:
        grown.resize_token_embeddings(37 + added)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | TABLES[variant])
    theirs = peft.get_peft_model(grown, config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(some := some_tokens()).logits
    # float32, logits up to 20; a row in the wrong place differs by more than 0.1
    if variant != "low rank" or not tied:  # PEFT's merge changes the tied head, too, which its adapter did not
        torch.testing.assert_close(theirs.merge_and_unload()(some).logits, expected, rtol=0, atol=3e-4)
    merge(Merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", untie=True))
    known = 37 if variant == "low rank" and not tied else 37 + added  # PEFT leaves out the new rows of that head
    for found in (load_model(tmp_path / "merged")(some), hf_model(tmp_path / "merged").float()(some).logits):
        torch.testing.assert_close(found[..., :known], expected[..., :known], rtol=0, atol=3e-4)


PATTERNS = {
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}},
    "alphas": {"alpha_pattern": {"up_proj": 3, "model.layers.0.self_attn.q_proj": 20}},
    "both": {"rank_pattern": {r".*\.0\..*": 1}, "alpha_pattern": {"q_proj": 1}, "use_dora": True},
    "rank-stable": {"rank_pattern": {"q_proj": 9}, "use_rslora": True},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers", "rank_pattern": {"up_proj": 2}},
}


@pytest.mark.parametrize("variant", PATTERNS)
def test_ranks_and_alphas_by_layer(variant, tmp_path):
    """From PEFT to us, and back."""
    model = our_model().float()
    save_as_hf(model, tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **PATTERNS[variant])
    theirs = peft.get_peft_model(hf_model(tmp_path / "base").float(), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": None}))  # as some programs write "none"
    our_peft.load(model, tmp_path / "adapter")
    tokens = some_tokens()
    torch.testing.assert_close(model.double()(tokens), theirs.double()(tokens).logits, rtol=0, atol=1e-10)
    our_peft.save(tmp_path / "again", model)
    back = peft.PeftModel.from_pretrained(hf_model(tmp_path / "base"), tmp_path / "again").double()
    torch.testing.assert_close(back(tokens).logits, model(tokens), rtol=0, atol=1e-10)


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

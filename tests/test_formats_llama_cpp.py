"""GGUF files run by llama.cpp: probabilities and ids are those of the model here."""

import json
from pathlib import Path

import pytest
import torch
from helpers.llama_cpp import LlamaCpp
from helpers.lora_models import shake
from helpers.tiny_chat_model import chat_tokenizer
from helpers.varied_lines import varied
from helpers.vocabularies import byte_level, llama, ours  # noqa: F401

import convert
from checkpoint import peft
from checkpoint.directory import load_model, save_model
from convert import Export, Import, Merge
from lora import adapters
from lora.adapters import LoraArgs
from model import Transformer
from model_args import ModelArgs

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "tied": {},
    "untied": {"tie_embeddings": False, "n_kv_heads": 1},
    "biased": {"attention_bias": True, "n_kv_heads": 2},
    "normed": {"qk_norm": True, "head_dim": 16, "n_kv_heads": 2},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "ntk": {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn of qwen": {"rope_scaling": YARN, "attention_bias": True},
    "llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
}


def saved(folder: Path, tokenizer, **changes) -> Transformer:
    torch.manual_seed(4)
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_seq_len": 64}
    model = Transformer(ModelArgs(**shape | {"vocab_size": tokenizer.vocab_size} | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    save_model(folder, model, tokenizer)
    return load_model(folder, dtype=torch.float64).requires_grad_(False)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_probabilities_are_equal(changes, tmp_path):
    model = saved(tmp_path / "in", chat_tokenizer(tmp_path), **changes)
    convert.export(Export(model=tmp_path / "in", format="gguf", out=tmp_path / "x.gguf"))
    theirs = LlamaCpp(tmp_path / "x.gguf")
    ids = torch.arange(40)[None] * 17 % 330
    wanted = model(ids)[0].double().log_softmax(-1)
    for length in (1, 5, 40):
        found = theirs.log_probs(ids[0, :length].tolist(), 330)
        # float32 against float64, and logarithms that go as text
        torch.testing.assert_close(found, wanted[length - 1].double(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "most"), [("fp16", 0.01), ("bf16", 0.06), ("q8_0", 0.1), ("q4_0", 1.5), ("q4_k", 1.5)]
)
def test_rounded_weights_are_run(dtype, most, tmp_path):
    model = saved(tmp_path / "in", chat_tokenizer(tmp_path), dim=256, hidden_dim=256)
    convert.export(Export(model=tmp_path / "in", format="gguf", out=tmp_path / "x.gguf", dtype=dtype))
    ids = [1, 300, 301, 302]
    wanted = model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
    found = LlamaCpp(tmp_path / "x.gguf").log_probs(ids, 330)
    assert (found - wanted).abs().mean() < most * wanted.std()
    convert.import_(Import(source=tmp_path / "x.gguf", out=tmp_path / "back"))
    same = load_model(tmp_path / "back")(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
    # the same weights; llama.cpp rounds activations to 8 bits, or to bfloat16, where it multiplies with such weights
    assert (found - same).abs().mean() < 0.12 * wanted.std()


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa"])
def test_an_adapter_on_its_base_is_the_merged_model(method, tmp_path):
    saved(tmp_path / "in", chat_tokenizer(tmp_path), n_kv_heads=2)
    model = load_model(tmp_path / "in").requires_grad_(True)
    layers = (("model.layers.1.mlp.up_proj", 2, 3.0),)
    adapters.apply(model, LoraArgs(method, r=4, targets="linear"))
    shake(model)
    peft.save(tmp_path / "adapter", model, base=str(tmp_path / "in"))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    if method == "lora":  # a layer with another alpha
        config["alpha_pattern"] = {layers[0][0]: 3.0}
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    convert.merge(Merge(tmp_path / "in", tmp_path / "adapter", tmp_path / "merged"))
    for name in ("in", "adapter"):
        convert.export(Export(model=tmp_path / name, format="gguf", out=tmp_path / f"{name}.gguf"))
    ids = [1, 300, 310, 320, 7]
    wanted = load_model(tmp_path / "merged", dtype=torch.float64)(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
    found = LlamaCpp(tmp_path / "in.gguf", tmp_path / "adapter.gguf").log_probs(ids, 330)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    assert (found - LlamaCpp(tmp_path / "in.gguf").log_probs(ids, 330)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["ours", "byte_level", "llama"])
def test_the_ids_of_any_text_are_equal(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    saved(tmp_path / "in", tokenizer, dim=32, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=tokenizer.vocab_size + 3)
    convert.export(Export(model=tmp_path / "in", format="gguf", out=tmp_path / "x.gguf"))
    theirs = LlamaCpp(tmp_path / "x.gguf")
    wrong = [line for line in varied(200) if theirs.encode(line) != tokenizer.encode(line)]
    assert wrong == []
    assert theirs.encode("the rain", add_special=True) == tokenizer.begins + tokenizer.encode("the rain")

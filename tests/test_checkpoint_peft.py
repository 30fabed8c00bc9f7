"""Adapter directories that are damaged, of another kind, or of another model: each is one sentence."""

import json
from pathlib import Path

import pytest
import torch
from helpers.lora_models import our_model
from safetensors.torch import load_file, save_file

from checkpoint import peft
from lora import adapters
from lora.adapters import LoraArgs

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = our_model()
    adapters.apply(model, LoraArgs("lora", r=2))
    peft.save(tmp_path / "adapter", model)
    return tmp_path / "adapter"


def refused(adapter: Path, message: str, **shape: int) -> None:
    model = our_model(**shape)
    before = model.state_dict()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        peft.load(model, adapter)
    assert model.state_dict().keys() == before.keys() and not adapters.active(model)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "should describe an adapter of peft_type LORA, found IA3"),
        ({"r": None}, "should set r to a number, found None"),
        ({"r": "2"}, "should set r to a number, found '2'"),
        ({"r": 0}, "r should be at least 1"),
        ({"r": 3}, r"q_proj.lora_A.weight is \(2, 24\) there and \(3, 24\) here"),
        ({"lora_alpha": "16"}, "should set lora_alpha to a number"),
        ({"lora_dropout": None}, "should set lora_dropout to a number"),
        ({"bias": "all"}, "sets bias to 'all', which is not supported here"),
        ({"rank_pattern": {"q_proj": 4}}, r"q_proj\.lora_A\.weight is \(2, 24\) there and \(4, 24\) here"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern should map names of layers to numbers above 0"),
        ({"alpha_pattern": [3]}, "alpha_pattern should map names of layers to numbers above 0"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern has '\(', which is no regular expression"),
        ({"base_model_name_or_path": ["m"]}, r"base_model_name_or_path should be a name or null, found \['m'\]"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
    ],
)
def test_settings(adapter, changes, message):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(adapter, message)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[1]", r"should hold an object, found list"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON"),
        (None, "is no adapter directory"),
    ],
)
def test_a_config_that_is_none(adapter, content, message):
    path = adapter / "adapter_config.json"
    path.unlink() if content is None else path.write_bytes(content)
    refused(adapter, message)


def test_what_peft_leaves_out_is_its_default(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key != "lora_alpha"}))
    model = our_model()
    peft.load(model, adapter)
    assert model.get_submodule("model.layers.0.self_attn.q_proj").lora["default"].scaling == 8 / 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(f"{QUERY}.lora_B.weight"), r"lacks .*q_proj\.lora_B\.weight"),
        (lambda tensors: tensors.update({f"{QUERY}.lora_C.weight": torch.ones(1)}), "has no place for"),
        (
            lambda tensors: tensors.update({f"{QUERY}x.lora_A.weight": torch.ones(1)}),
            "of another model: this one has no",
        ),
        (lambda tensors: tensors.update({f"{QUERY}.lora_A.weight": torch.ones(2, 5)}), r"\(2, 5\) there and \(2, 24\)"),
        (lambda tensors: tensors.clear(), "holds no LoRA tensors"),
        (lambda tensors: tensors[f"{QUERY}.lora_A.weight"].fill_(torch.nan), r"not finite, in .*q_proj.lora_A.weight"),
    ],
)
def test_tensors(adapter, change, message):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refused(adapter, message)


def test_another_model_and_damaged_files(adapter):
    refused(adapter, r"of another model: .* there and \(2, 32\) here", dim=32)
    refused(adapter, r"of another model: this one has no model\.layers\.1\.", n_layers=1)
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    refused(adapter, "truncated or damaged")
    path.unlink()
    refused(adapter, "only safetensors are read")

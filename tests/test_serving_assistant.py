"""Finding a model, loading it, and the way from messages to ids and back."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_chat_model import save_chat_model

import hardware
from checkpoint import peft
from checkpoint.directory import load_model, save_model
from checkpoint.locate import DEFAULT_MODEL, find_model
from decoding.params import SamplingParams
from hardware import fastest_dtype
from lora import adapters
from model import Transformer
from model_args import ModelArgs
from serving import assistant as assistant_file
from serving.assistant import load_assistant, open_draft
from tokenizer import load_tokenizer

GREEDY = SamplingParams(temperature=0, max_new_tokens=30)
CPU = (torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("run") / "step_00000007")


def test_finds_a_model_a_run_and_the_newest(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no model at out/tiny/sft/best and none below out/; run `bash run.sh`"
    ):
        find_model(DEFAULT_MODEL)
    for step in ("pretrain/step_00000001", "sft/step_00000002", "sft/.step_00000003.writing"):
        shutil.copytree(directory, Path("out/tiny") / step)
    assert find_model(DEFAULT_MODEL) == Path("out/tiny/sft/step_00000002")
    assert "using the newest, out/tiny/sft/step_00000002" in capsys.readouterr().err
    Path("out/tiny/sft/last").symlink_to("step_00000002")
    assert find_model(DEFAULT_MODEL) == find_model(Path("out/tiny/sft")) == Path("out/tiny/sft/last")
    assert "there is no out/tiny/sft/best, since its run was not evaluated" in capsys.readouterr().err
    Path("out/tiny/sft/best").symlink_to("step_00000002")
    assert find_model(DEFAULT_MODEL) == find_model(Path("out/tiny/sft")) == DEFAULT_MODEL
    assert capsys.readouterr().err == ""
    with pytest.raises(FileNotFoundError, match=r"out/mine does not exist; run `bash run.sh` to train one, or give"):
        find_model(Path("out/mine"))
    with pytest.raises(FileNotFoundError, match=r"out is no model directory \(it has no config.json\)"):
        find_model(Path("out"))
    with pytest.raises(FileNotFoundError, match=r"\. is no model directory \(it has no config.json\)"):
        find_model(Path())


def test_a_directory_without_a_tokenizer_is_one_sentence(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(FileNotFoundError, match=r"model.*: no such tokenizer"):
        load_assistant(tmp_path / "model", *CPU)


def test_a_tokenizer_of_another_model_is_refused(directory, tmp_path):
    smaller = Transformer(ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=300))
    save_model(tmp_path / "model", smaller, load_tokenizer(directory))
    with pytest.raises(ValueError, match=r"has 330 ids, the model 300: they do not belong together"):
        load_assistant(tmp_path / "model", *CPU)


@pytest.fixture(scope="module")
def adapted(directory, tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A directory with an adapter of the model in `directory`, and the model with it; both answer otherwise."""
    model = load_model(directory)
    adapters.apply(model, adapters.LoraArgs("dora", r=4, train_embed_norm=True))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("adapter") / "best"
    peft.save(folder, model, base=str(directory))
    return folder, model.eval()


def test_an_adapter_answers_in_the_place_of_its_base(directory, adapted):
    folder, model = adapted
    tokens = torch.arange(4, 24)[None]
    for path, base in ((folder, None), (folder.parent, None), (folder, directory)):
        assistant = load_assistant(find_model(path), *CPU, base=base)
        assert not any(hasattr(module, "lora") for module in assistant.model.modules())  # merged: nothing slows it down
        torch.testing.assert_close(
            assistant.model(tokens), model(tokens), rtol=0, atol=1e-4
        )  # float32, logits around 10
    assert assistant.template is not None  # of the base: this adapter came without a tokenizer
    other = load_assistant(directory, *CPU).model(tokens)
    assert (assistant.model(tokens) - other).abs().max() > 0.1
    half = load_assistant(folder, CPU[0], torch.bfloat16).model
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_an_adapter_of_quantized_weights_answers_on_those(directory, tmp_path):
    model = load_model(directory)
    adapters.apply(model, adapters.LoraArgs("lora", r=4, base="int8"))
    peft.save(tmp_path / "adapter", model, base=str(directory))
    tokens = torch.arange(4, 24)[None]
    answered, full = (
        load_assistant(tmp_path / "adapter", *CPU).model(tokens),
        load_assistant(directory, *CPU).model(tokens),
    )
    torch.testing.assert_close(answered, model.eval()(tokens), rtol=0, atol=1e-4)
    assert (answered - full).abs().max() > 1e-3
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors; only safetensors are read"):
        load_assistant(tmp_path / "adapter", *CPU)


def test_an_adapter_brings_its_own_tokenizer(directory, adapted, tmp_path):
    shutil.copytree(adapted[0], tmp_path / "adapter")
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save(tmp_path / "adapter")
    assert load_assistant(tmp_path / "adapter", *CPU).tokenizer.chat_template == tokenizer.chat_template


def test_a_base_that_is_not_there_or_not_asked_for(directory, adapted, tmp_path):
    shutil.copytree(adapted[0], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    for name, found in (("gone/7B", "of gone/7B, which is no model directory here"), (None, "does not name its model")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
        with pytest.raises(FileNotFoundError, match=rf"{found}; say where that model lies with --base DIR"):
            load_assistant(tmp_path / "adapter", *CPU)
    assert load_assistant(tmp_path / "adapter", *CPU, base=directory)
    with pytest.raises(ValueError, match="is a whole model: leave it out"):
        load_assistant(directory, *CPU, base=directory)


def test_an_empty_stop_string_is_refused(directory):
    with pytest.raises(ValueError, match="a stop string is empty"):
        load_assistant(directory, *CPU, stop=["a", ""])


def test_a_template_that_cannot_be_used_is_told(directory, capsys):
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = "{{ broken"
    assert assistant_file.usable_template(tokenizer) is None
    assert "this model's chat template cannot be used, so it only continues texts" in capsys.readouterr().err


@pytest.mark.parametrize("raw", [True, False])
def test_a_draft_answers_as_the_model_alone_does(directory, raw):
    assistant = load_assistant(directory, *CPU, raw=raw)
    alone = "".join(assistant.reply("江上", GREEDY))
    for draft in ("lookup", str(directory)):
        drafted = dataclasses.replace(assistant, decoder=open_draft(assistant, draft, 3))
        assert "".join(drafted.reply("江上", GREEDY)) == alone
        assert drafted.decoder.tally.passes > 0
    assert drafted.decoder.tally.accepted == drafted.decoder.tally.drafted > 0


def test_a_draft_with_another_tokenizer_is_refused(directory, tmp_path):
    assistant = load_assistant(directory, *CPU)
    shutil.copytree(directory, tmp_path / "other")
    config = tmp_path / "other" / "tokenizer.json"
    config.write_text(config.read_text(encoding="utf8").replace("<|end|>", "<|fin|>"), encoding="utf8")
    with pytest.raises(ValueError, match=r"the draft in .*other has another tokenizer than .*step_00000007"):
        open_draft(assistant, str(tmp_path / "other"), 3)


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_where_it_is_the_faster_one(monkeypatch, has):
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: has)
    fast, cpu, gpu = torch.bfloat16 if has else torch.float32, torch.device("cpu"), torch.device("cuda")
    assert fastest_dtype(gpu, decodes=True) == fastest_dtype(cpu, decodes=False) == fast
    assert fastest_dtype(cpu, decodes=True) == torch.float32

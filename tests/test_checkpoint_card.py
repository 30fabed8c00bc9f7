"""The model card: what the Hub reads in it, and that it says what the record says, and no more."""

import json
import re
import struct
from pathlib import Path

import pytest
import yaml
from helpers.tiny_chat_model import save_chat_model
from huggingface_hub import ModelCard

import convert
from checkpoint.history import write_origin
from convert import Card, Export


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = value if isinstance(value, list) else [value]
    path.write_text("\n".join(json.dumps(line) for line in lines), "utf8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """data/, pretrain/best and sft/best with the records of two runs, made by hand."""
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "data/train_00000.json", {"tokens": 900, "sources": {"tang": 30, "books": 4}, "dtype": "uint16"})
    write(folder / "data/train_00001.json", {"tokens": 100, "sources": {"books": 5}, "dtype": "uint16"})
    sources = {"tang": {"tokens": 700, "held_out_tokens": 60}, "books": {"tokens": 370, "held_out_tokens": 10}}
    write(folder / "data/summary.json", {"sources": sources, "made_from": {"corpus": ["chinese_poems"]}})
    save_chat_model(folder / "pretrain/best")
    record = {"git": "abc1234", "versions": {"torch": "2.13.0"}}
    inputs = {str(folder / f"data/train_0000{i}.json"): "0" * 64 for i in range(2)}
    of_pretrain(folder, record | {"inputs": inputs})
    save_chat_model(folder / "sft/best")
    (folder / "sft/best/chat_template.jinja").write_text("{{ messages }}")
    settings = {"init_from": str(folder / "pretrain/best"), "objective": "sft", "train": {"seed": 7}}
    (folder / "sft/config.yaml").write_text(yaml.safe_dump({"fine_tuning": settings}))
    write(folder / "sft/run.json", record | {"inputs": {"chats/mine.jsonl": "ab" * 32}})
    write(folder / "sft/metrics.jsonl", [{"step": 5, "eval_loss": 4.0}, {"step": 10, "eval_loss": 3.5}, {"step": 10}])
    write(folder / "sft/best/training_state/progress.json", {"progress": {"step": 10, "tokens": 12345}})
    write(folder / "sft/samples.jsonl", [{"step": s, "prompt": "江上", "text": f"at {s}"} for s in (5, 10)])
    return folder


def of_pretrain(folder: Path, record: dict) -> None:
    settings = {"data": {"seq_len": 64, "batch_size": 8}, "optim": {"optimizer": "muon", "lr": 0.004}}
    (folder / "pretrain/config.yaml").write_text(yaml.safe_dump({"pretrain": settings}))
    write(folder / "pretrain/run.json", record)
    result = {"steps": 40, "tokens": 20480, "model": "pretrain/best", "loss": 2.5, "loss_error": 0.1}
    write(folder / "pretrain/result.json", result | {"bits_per_byte": 0.875})


def made(model: Path, out: Path, **options) -> str:
    convert.card(Card(model=model, out=out, **options))
    return out.read_text("utf8")


def test_the_hub_reads_what_the_author_said(folder, tmp_path):
    made(folder / "sft", tmp_path / "README.md", license="Apache-2.0", language=("zh", "en"), base_model="a/b")
    head = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert head == {
        "language": ["zh", "en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "a/b",
        "base_model_relation": "finetune",
        "tags": ["pretraining", "fine-tuning"],
    }
    made(folder / "sft", tmp_path / "other.md", license="My own licence 1.0")
    head = ModelCard.load(tmp_path / "other.md").data.to_dict()
    assert head["license"] == "other" and head["license_name"] == "My own licence 1.0"


def test_it_says_what_the_runs_recorded(folder, tmp_path):
    text = made(folder / "pretrain/best", tmp_path / "a.md")
    assert "| loss | 2.500 nats per token, 95 % interval 2.304 to 2.696 |" in text  # 2.5 -+ 1.96 * 0.1
    assert "| bits per byte | 0.875 |" in text and "| on all held-out data | |" in text
    assert "| tang | not recorded | 30 | 640 |  |" in text and "| books | not recorded | 9 | 360 |  |" in text
    assert "| optimizer | muon |" in text and "| rows of a step | 8 |" in text
    text = made(folder / "sft/best", tmp_path / "b.md", name="me/poet")
    assert text.index("## 1. Pretraining") < text.index("## 2. Fine-tuning")
    assert "| mine.jsonl | not recorded |  |  | abababababab |" in text
    assert "| loss | 3.500 nats per token |" in text and "a part of the held-out data, on the way" in text
    assert "| tokens seen | 12,345 |" in text and "| seed | 7 |" in text
    assert "at 10" in text and "at 5" not in text  # what this checkpoint wrote, not an earlier one
    assert 'AutoModelForCausalLM.from_pretrained("me/poet")' in text and "apply_chat_template" in text


def test_a_copied_a_merged_and_a_quantized_model_have_the_runs_of_what_they_were_made_of(folder, tmp_path):
    convert.export(Export(model=folder / "sft", out=tmp_path / "copy", format="huggingface", dtype="bf16"))
    merged = save_chat_model(folder / "sft/merged")  # beside the checkpoints, as people do
    write_origin(merged, "merge", model=folder / "pretrain/best", adapter=tmp_path / "copy")
    quantized = save_chat_model(tmp_path / "four_bits")
    settings = {"model": str(merged), "method": "gptq", "bits": 4, "calib": ["texts/poems.txt"]}
    write(quantized / "quantization_report.json", {"settings": settings, "layers": {}})
    for model in (tmp_path / "copy", merged, quantized):
        text = made(model, tmp_path / f"{model.name}.md")
        assert text.index("## 1. Pretraining") < text.index("## 2. Fine-tuning")
        assert "| tokens seen | 12,345 |" in text and ("at 10" in text) == (model != quantized)  # who wrote that
    assert "## 3. Quantization" in text and "| method | gptq |" in text and "| poems.txt | not recorded |" in text
    assert "base_model" not in text and "How to use it" in text


def test_the_licence_of_a_corpus_is_that_of_our_table(folder, tmp_path, monkeypatch):
    from corpora.registry import CORPORA, Corpus

    monkeypatch.setitem(CORPORA, "tang", Corpus("tang", "poems", "MIT", lambda _: iter(())))
    assert "| tang | MIT | 30 | 640 |" in made(folder / "pretrain", tmp_path / "a.md")


def test_what_the_record_lacks_is_named_and_nothing_is_made_up(tmp_path, capsys):
    model = save_chat_model(tmp_path / "alone")
    text = made(model, tmp_path / "a.md")
    told = capsys.readouterr().err
    lacking = text[text.index("## Not recorded") :]
    for each in ("the licence of this model", "its languages", "how it was trained: there is no record of a run"):
        assert f"- {each}" in lacking and f"not recorded: {each}" in told
    head = ModelCard.load(tmp_path / "a.md").data.to_dict()
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert "nats" not in text and "licen" not in text.replace(lacking, "").lower()


def test_a_run_without_held_out_data_has_no_empty_table(folder, tmp_path):
    assert "interval of the held-out loss" not in made(folder / "pretrain/best", tmp_path / "a.md")
    path = folder / "pretrain/result.json"
    result = json.loads(path.read_text())
    del result["loss_error"]
    write(path, result)
    assert "- the interval of the held-out loss of pretraining\n" in made(folder / "pretrain/best", tmp_path / "b.md")
    write(path, {key: result[key] for key in ("steps", "tokens", "model") if key in result})
    text = made(folder / "pretrain/best", tmp_path / "c.md")
    assert "held-out data |" not in text and "- a held-out loss of pretraining\n" in text


def test_the_number_of_parameters_is_that_of_the_files(tmp_path):
    from checkpoint.history import parameters

    head = json.dumps({"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, "__metadata__": {}}).encode()
    for name in ("x", "y"):
        (tmp_path / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(48))
    assert parameters(tmp_path) == 24
    (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", len(head)) + head[:9])
    with pytest.raises(ValueError, match=r"y\.safetensors is damaged: its header cannot be read"):
        parameters(tmp_path)
    assert parameters(tmp_path / "nowhere") is None


def test_damaged_records_count_as_missing(folder, tmp_path):
    for name in ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_bytes(b"{\xff\x00: [")
    text = made(folder / "pretrain/best", tmp_path / "a.md", run=tmp_path)
    assert "## Not recorded" in text


def test_a_run_that_began_with_itself_ends(tmp_path):
    model = save_chat_model(tmp_path / "run/best")
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"pretrain": {"init_from": str(model)}}))
    write(tmp_path / "run/run.json", {})
    assert made(model, tmp_path / "a.md").count("Pretraining") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"language": ("Chinese",)}, "--language Chinese is no code of ISO 639"),
        ({"base_model": "somewhere"}, "--base_model somewhere is no name on the Hub such as owner/model"),
        ({"run": Path("nowhere")}, "--run nowhere has no config.yaml and run.json"),
        ({"out": Path("here.md")}, "--out here.md exists already"),
        ({"model": Path("nowhere")}, "nowhere does not exist; give --model a model directory"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.md").write_text("mine")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
        convert.card(Card(**{"model": folder / "sft", "out": Path("new.md"), **options}))
    assert Path("here.md").read_text() == "mine" and not Path("new.md").exists()

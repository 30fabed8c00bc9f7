"""doctor.py names the fault that a test has planted, and finds none where there is none."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.patients import QUESTIONS, save_chats, save_data, save_patient
from helpers.tiny_training_run import toy_data, toy_trainer
from safetensors.torch import load_file, save_file

import doctor
from checks import machine, runs, vocabulary, weights
from checks.check import FAULT, OK, WARNING, Check, attempt, judged, lines, worst
from dataset import Batch
from model_args import ModelArgs
from tokenizer import load_tokenizer

STORIES = Path(__file__).parents[2] / "shared/data/models/stories260K_hf"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Do not measure this machine for a third of a second in every test."""
    monkeypatch.setattr(machine, "peak_flops", lambda *_: (1e12, "not measured"))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """A model, data and conversations without a fault, in one folder."""
    folder = tmp_path_factory.mktemp("healthy")
    _, tokenizer = save_patient(folder)
    save_data(folder / "data", tokenizer)
    save_chats(folder / "chats.jsonl", QUESTIONS[:30])
    save_chats(folder / "heldout.jsonl", QUESTIONS[30:])
    return folder


@pytest.fixture
def patient(healthy, tmp_path) -> Path:
    """A copy to plant a fault in."""
    shutil.copytree(healthy, tmp_path / "patient")
    return tmp_path / "patient"


def examine(folder: Path, *names: str, **more) -> dict[str, Check]:
    """The checks of what is named (model, data, chats, heldout), by their names."""
    paths = {"model": folder / "model", "data": folder / "data", "heldout": folder / "heldout.jsonl"}
    paths["chats"] = (folder / "chats.jsonl",)
    json_file = folder / "checks.json"
    args = doctor.Args(**{name: paths[name] for name in names} | more, json=json_file, device="cpu")
    try:
        doctor.main(args)
    except SystemExit as stop:
        assert stop.code == 1
    told = json.loads(json_file.read_text())
    found = [Check(**each) for each in told["checks"]]
    assert told["worst"] == worst(found)
    return {each.name: each for each in found}


def wrong(checks: dict[str, Check]) -> dict[str, str]:
    """What is not OK, but for the machine and for what is true of every new model."""
    of_machine = ("threads", "bf16", "compiler", "rate", "memory", "loss on the text", "held-out tokens")
    return {each.name: each.level for each in checks.values() if each.level != OK and each.name not in of_machine}


def test_nothing_is_wrong_with_the_healthy(healthy, capsys):
    checks = examine(healthy, "model", "data", "chats", "heldout")
    assert wrong(checks) == {} and len(checks) > 25
    assert checks["loss on the text"].level == FAULT  # it was never trained
    out = capsys.readouterr().out
    assert "OK       hashes" in out and "what to do: the tokenizer may be that of another model" in out


# ---- faults in weights


def change_weights(folder: Path, change) -> None:
    """Apply `change(tensors)` to the weights; the sums go, as after a conversion by another program."""
    path = folder / "model" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.rmtree(folder / "model" / "training_state")


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


UP = "model.layers.1.mlp.up_proj.weight"


def nan(tensors: dict) -> None:
    tensors[UP][3, 5] = float("nan")


def zeros(tensors: dict) -> None:
    tensors[UP].zero_()


def huge(tensors: dict) -> None:
    tensors[UP] *= 1000


def alike(tensors: dict) -> None:
    tensors[UP][:] = tensors[UP][0]


@pytest.mark.parametrize(
    "change, name",
    [
        (nan, "weights not finite"),
        (zeros, "weights all zeros"),
        (huge, "weights too large"),
        (alike, "weights rows alike"),
    ],
)
def test_a_fault_in_the_weights_is_named_with_its_tensor(patient, change, name):
    change_weights(patient, change)
    checks = examine(patient, "model")
    assert checks[name].level == FAULT and UP in checks[name].found
    assert set(wrong(checks)) == {name}


def test_a_head_that_should_be_tied(patient):
    change_weights(patient, lambda t: t.update({"lm_head.weight": torch.randn(t["model.embed_tokens.weight"].shape)}))
    checks = examine(patient, "model")
    assert checks["model"].level == FAULT and "contradicts itself" in checks["model"].found


def test_a_head_that_is_the_embedding_and_not_said_to_be(patient):
    change_weights(patient, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    change_json(patient / "model/config.json", tie_word_embeddings=False)
    assert wrong(examine(patient, "model")) == {"tied embeddings": WARNING}


def test_a_flipped_bit_in_a_checkpoint(patient):
    path = patient / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    checks = examine(patient, "model")
    assert checks["hashes"].level == FAULT and "model.safetensors" in checks["hashes"].found


def test_a_file_of_weights_that_is_cut_off(patient):
    path = patient / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert examine(patient, "model")["model"].level == FAULT


def test_layers_that_the_config_does_not_have(patient):
    change_json(patient / "model/config.json", num_hidden_layers=1)
    assert "without a place" in examine(patient, "model")["model"].found


# ---- faults between tokenizer and model


def test_a_vocabulary_larger_than_the_embedding(tmp_path):
    save_patient(tmp_path, vocab_size=300)
    assert examine(tmp_path, "model")["vocabulary"].level == FAULT


def test_the_tokenizer_of_another_model(patient):
    """With as many ids: only the data, which know their tokenizer, and the loss can tell."""
    config = json.loads((patient / "model/tokenizer.json").read_text())
    vocab = config["model"]["vocab"]
    first, second = [piece for piece in vocab if len(piece) == 1 and piece.isalpha()][:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (patient / "model/tokenizer.json").write_text(json.dumps(config))
    (patient / "model/tokenizer.model").unlink(missing_ok=True)
    checks = examine(patient, "model", "data")
    assert checks["train_00000.bin"].level == FAULT and "another tokenizer" in checks["train_00000.bin"].found


@pytest.mark.parametrize("theta, level", [(5e5, OK), (1e4, WARNING)])
def test_a_rope_theta_that_the_family_does_not_have(theta, level):
    class Known:
        vocab_size, eos_id, special = 128_256, 1, {"<|begin_of_text|>": 0}

    shape = ModelArgs(dim=8, n_heads=1, vocab_size=128_256, rope_theta=theta)
    checks = {each.name: each for each in vocabulary.fits(Known(), shape)}
    assert checks["rope_theta"].level == level


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs a trained model")
def test_a_wrong_rope_theta_of_a_trained_model_is_measured():
    model, tokenizer = weights.load_model(STORIES), load_tokenizer(STORIES)
    text = (
        "Once upon a time, there was a little girl named Lily. She liked to play in the park with her friend Tom. " * 4
    )

    class Row:
        seq_len, batch_size, steps_per_epoch = 100, 1, 1

        def batch(self, step, rank=0, world=1):
            ids = torch.tensor([[1, *tokenizer.encode(text)][:101]])
            return Batch(ids[:, :-1], ids[:, 1:])

    for theta, level in ((model.args.rope_theta, OK), (1e6, FAULT)):
        other = weights.with_theta(model, theta)
        checks = {each.name: each for each in weights.on_text(other, Row())}
        assert checks["loss on the text"].level == OK
        assert checks["rope_theta on the text"].level == level, checks


def test_a_tokenizer_that_does_not_suit_the_texts(healthy):
    (healthy / "korean.txt").write_text(
        "옛날 옛적에 한 마을에 착한 소년이 살았습니다.\n\n그 소년은 매일 산에 갔습니다.", encoding="utf8"
    )
    checks = examine(healthy, "model", text=healthy / "korean.txt")
    assert checks["tokenizer suits the text"].level == FAULT


def test_a_model_that_does_not_stop_at_the_end_of_an_answer(patient):
    change_json(patient / "model/generation_config.json", eos_token_id=5)
    assert examine(patient, "model", "chats")["end of an answer"].level == FAULT


# ---- faults in data


def test_a_bin_that_is_cut_off(patient):
    path = patient / "data/train_00000.bin"
    path.write_bytes(path.read_bytes()[:-6])
    checks = examine(patient, "data")
    assert checks["train_00000.bin"].level == FAULT and "expected" in checks["train_00000.bin"].found


def test_an_index_that_falls(patient):
    path = patient / "data/train_00000.idx"
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack("<Q", 1)
    path.write_bytes(data)
    checks = examine(patient, "data")
    assert checks["train_00000.bin"].level == FAULT and "offsets that rise" in checks["train_00000.bin"].found


def test_an_id_outside_the_vocabulary(patient):
    path = patient / "data/train_00000.bin"
    ids = np.fromfile(path, np.uint16)
    ids[100] = 9999
    ids.tofile(path)
    found = examine(patient, "data")["train_00000.bin"]
    assert found.level == FAULT and "9999" in found.found


def test_documents_that_do_not_end(patient):
    header = patient / "data/train_00000.json"
    change_json(header, eos_id=7)
    assert examine(patient, "data")["train_00000.bin: ends"].level == FAULT


def test_held_out_documents_that_are_trained_on(patient):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(patient / f"data/train_00000{suffix}", patient / f"data/heldout{suffix}")
    assert wrong(examine(patient, "data")) == {"held out, and trained": FAULT}


def test_no_held_out_data_and_no_data(patient, tmp_path):
    (patient / "data/heldout.bin").unlink()
    assert examine(patient, "data")["held-out data"].level == WARNING
    (patient / "data/train_00000.bin").unlink()
    assert examine(patient, "data")["token bins"].level == FAULT


# ---- faults in conversations


def test_answers_that_are_all_masked(patient):
    save_chats(patient / "chats.jsonl", QUESTIONS, loss=False)
    checks = examine(patient, "model", "chats")
    assert checks["chats.jsonl"].level == FAULT and '"loss": false' in checks["chats.jsonl"].found


def test_a_template_whose_answers_do_not_end(patient):
    template = patient / "endless.jinja"
    template.write_text(
        "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}{%- generation -%}{{- m['content'] -}}"
        "{%- endgeneration -%}{%- else -%}{{- '<|user|>' + m['content'] -}}{%- endif -%}{%- endfor -%}"
    )
    assert examine(patient, "model", "chats", template=str(template))["template"].level == FAULT


def test_held_out_conversations_that_are_trained_on(patient):
    shutil.copy(patient / "chats.jsonl", patient / "heldout.jsonl")
    assert wrong(examine(patient, "model", "chats", "heldout")) == {"held out, and trained": FAULT}


def test_conversations_longer_than_a_row(patient):
    assert examine(patient, "model", "chats", seq_len=10)["chats.jsonl"].level == FAULT  # no answer begins so early
    assert examine(patient, "model", "chats", seq_len=41)["chats.jsonl: whole"].level in (WARNING, FAULT)


# ---- faults of a run


def test_a_damaged_checkpoint_and_a_loss_that_is_no_number(tmp_path, capsys):
    data = toy_data(tmp_path)
    toy_trainer(tmp_path / "run", data, max_steps=6, save_interval=3, loggers=()).fit()
    levels = {each.name: each.level for each in runs.run_directory(tmp_path / "run")}
    assert {levels[name] for name in ("last checkpoint", "step_00000003", "step_00000006")} == {OK}
    with (tmp_path / "run/step_00000003/model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": NaN}\n')
    (tmp_path / "run/guards").mkdir()
    found = runs.run_directory(tmp_path / "run")
    faults = {each.name for each in found if each.level == FAULT}
    assert faults == {"step_00000003", "log"} and "guards" in {each.name for each in found}
    (missing,) = runs.run_directory(tmp_path / "nowhere")
    assert missing.level == FAULT


# ---- faults of the machine


def test_one_thread_of_many(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (found,) = machine.threads()
    assert found.level == WARNING and "OMP_NUM_THREADS=16" in found.advice
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert machine.threads()[0].level == OK


def test_bf16_on_a_machine_without(monkeypatch):
    monkeypatch.setattr(machine, "has_bfloat16", lambda _: False)
    assert machine.bfloat16(torch.device("cpu"), "bf16").level == WARNING
    assert machine.bfloat16(torch.device("cpu"), "auto").level == OK


def test_no_compiler_no_memory_no_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "can_compile", lambda _: False)
    assert machine.compiler(torch.device("cpu"), "auto").level == WARNING
    assert machine.compiler(torch.device("cpu"), "off").level == OK
    assert machine.memory(needed=10**15).level == WARNING
    assert machine.disk(tmp_path / "not/there", 10**16, "checkpoints").level == FAULT
    assert machine.disk(tmp_path / "not/there", 10, "checkpoints").level == OK


# ---- the form of checks


def test_an_error_of_ours_is_a_fault_and_others_are_not_hidden():
    def fail():
        yield Check(OK, "a", "", "")
        raise ValueError("b is\n  missing")

    first, second = attempt("x", "y", "do z", fail)
    assert first.level == OK and second == Check(FAULT, "x", "y", "b is missing", "do z")
    with pytest.raises(ZeroDivisionError):
        attempt("x", "y", "z", lambda: [1 / 0])


def test_lines():
    checks = [judged("a", "1", "1", "none", False), judged("bcd", "1", "2", "add one", True)]
    assert lines(checks) == [
        "OK       a    1",
        "FAULT    bcd  2",
        "         expected: 1",
        "         what to do: add one",
        "2 checks: 1 OK, 0 WARNING, 1 FAULT",
    ]
    assert worst([]) == OK


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"heldout": Path("x")}, "heldout x needs --chats"),
        ({"chats": (Path("x"),)}, "chats needs --model or --data"),
        ({"seq_len": 9}, "seq_len 9 needs --data or --chats"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        doctor.Args(**flags)

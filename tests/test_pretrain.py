"""What pretrain.py makes of its inputs before it hands them to the loop, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_chat import chat_tokenizer

import config
import pretrain
from bins import BinWriter
from config import file_sha256

SHAPE = "--model.dim 32 --model.n_layers 1 --model.n_heads 2 --model.multiple_of 8"
SMALL = f"{SHAPE} --data.seq_len 16 --data.batch_size 4 --train.max_steps 2 --train.compile off --train.device cpu"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tokenizer/, and train.bin as baby-llama2 writes it: uint16 and nothing else."""
    tokenizer = chat_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "data" / "tokenizer")
    ids = np.random.default_rng(0).integers(8, tokenizer.vocab_size, 400).astype("<u2")
    ids.tofile(tmp_path / "data" / "train.bin")
    return tmp_path


def run(folder: Path, *flags: str) -> dict:
    where = ["--data.dir", str(folder / "data"), "--out", str(folder / "run")]
    return pretrain.main(config.parse(pretrain.Args, "pretrain", [*where, *SMALL.split(), *flags]))


def test_a_headerless_bin_trains_and_is_recorded(folder):
    assert run(folder)["steps"] == 2
    path = folder / "data" / "train.bin"
    assert json.loads((folder / "run" / "run.json").read_text())["inputs"] == {str(path): file_sha256(path)}


def test_held_out_rows_are_cut_as_those_trained_on(folder, monkeypatch):
    tokenizer = pretrain.load_tokenizer(folder / "data" / "tokenizer")
    with BinWriter(folder / "data" / "heldout", tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
        for _ in range(9):
            writer.add([9, 10, 11, 12, tokenizer.eos_id])
    sources = []
    trainer = pretrain.Trainer

    def spy(model, optimizer, data, *args, **named):
        sources.extend([data, named["eval_data"]])
        return trainer(model, optimizer, data, *args, **named)

    monkeypatch.setattr(pretrain, "Trainer", spy)
    run(folder, "--data.isolate_documents", "true")
    assert [source.batch(0).doc_ids is not None for source in sources] == [True, True]
    assert [source.headerless_eos_id for source in sources] == [tokenizer.eos_id] * 2


def test_another_model_to_go_on_from_is_another_run(folder):
    first = run(folder, "--out", str(folder / "first"))["model"]
    flags = ("--init_from", first)
    run(folder, *flags)
    assert run(folder, *flags)["steps"] == 2  # finished
    run(folder, "--out", str(folder / "first"), "--train.seed", "1", "--train.resume", "never")
    with pytest.raises(ValueError, match=r"holds a run with init_from .*, and this one has"):
        run(folder, *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data.seq_len", "300"], r"seq_len 300 is longer than the model's max_seq_len 256"),
        (["--data.dir", "nowhere"], r"no tokenizer at nowhere"),
        (["--data.train", "nowhere.bin"], r"no token bin at nowhere\.bin"),
        (["--data.weights", "1", "2"], r"expected one weight for each of the 1 bins"),
        (["--train.backend", "ddp"], r"is started by torchrun"),
        (["--train.backend", "deepspeed"], r"'deepspeed' is not available"),
    ],
)
def test_refused_before_anything_is_written(folder, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(folder, *flags)
    assert not (folder / "run").exists()


def test_a_model_without_room_for_the_tokenizers_ids_is_refused(folder):
    small = pretrain.Transformer(pretrain.ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=100))
    pretrain.save_model(folder / "small", small)
    with pytest.raises(ValueError, match=r"has 100 embeddings, the tokenizer of .* \d+ ids"):
        run(folder, "--init_from", str(folder / "small"))

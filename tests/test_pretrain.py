"""What pretrain.py makes of its inputs before it hands them to the loop, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_chat_model import chat_tokenizer

import data_process
import pretrain
from bins.token_bin import BinWriter
from checkpoint.directory import load_model
from checkpoint.extend import add_tokens
from cli.args import parse
from cli.record import file_sha256
from files import alone_in
from model_args import ModelArgs
from tokenizer import load_tokenizer

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
    words = SMALL.split()
    if "--init_from" in flags:  # a model that is there has its shape
        words = [word for pair in zip(words[::2], words[1::2]) if not pair[0].startswith("--model.") for word in pair]
    return pretrain.main(parse(pretrain.Args, "pretrain", [*where, *words, *flags]))


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
        (
            ["--data.seq_len", "300", "--model.max_seq_len", "96"],
            r"seq_len 300 is longer than the model's max_seq_len 96: .*--model\.max_seq_len 300",
        ),
        (["--data.dir", "nowhere"], r"nowhere.*: no such tokenizer"),
        (["--data.train", "nowhere.bin"], r"nowhere\.bin: no such token bin"),
        (["--data.weights", "1", "2"], r"expected one weight for each of the 1 bins"),
        (["--train.backend", "ddp"], r"is started by torchrun"),
    ],
)
def test_refused_before_anything_is_written(folder, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(folder, *flags)
    assert not (folder / "run").exists()


def test_a_model_without_room_for_the_tokenizers_ids_is_refused(folder):
    small = pretrain.Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=100))
    pretrain.save_model(folder / "small", small)
    with pytest.raises(ValueError, match=r"has 100 embeddings, the data's tokenizer \d+ ids"):
        run(folder, "--init_from", str(folder / "small"))


# ---- going on from a checkpoint


@pytest.fixture
def trained(folder: Path) -> str:
    """A model directory with the tokenizer of the data, made for 32 tokens."""
    return run(folder, "--out", str(folder / "first"), "--model.max_seq_len", "32")["model"]


def go_on(folder: Path, directory: str, *flags: str) -> dict:
    """The same without the flags that make a model."""
    small = ["--data.seq_len", "16", "--data.batch_size", "4", "--train.max_steps", "2", "--train.compile", "off"]
    where = ["--data.dir", str(folder / "data"), "--out", str(folder / "second"), "--init_from", directory]
    argv = [*where, *small, "--train.device", "cpu", *flags]
    return pretrain.main(parse(pretrain.Args, "pretrain", argv))


def test_training_goes_on_at_another_length_and_resumes(folder, trained, capsys):
    longer = ["--rope.type", "yarn", "--rope.factor", "4", "--model.max_seq_len", "128", "--data.seq_len", "100"]
    result = go_on(folder, trained, *longer)
    assert "positions: yarn (factor 4, original_max_position_embeddings 32), from 32 to 128" in capsys.readouterr().out
    model = load_model(result["model"])
    assert (model.args.max_seq_len, model.args.rope_scaling["factor"]) == (128, 4)
    assert go_on(folder, trained, *longer, "--train.max_steps", "3")["steps"] == 3  # resumed
    with pytest.raises(ValueError, match="holds a run with rope"):
        go_on(folder, trained, *longer[4:], "--rope.type", "dynamic")


def test_a_longer_context_alone_picks_type_and_factor(folder, trained, capsys):
    result = go_on(folder, trained, "--model.max_seq_len", "64")
    assert "positions: yarn (factor 2" in capsys.readouterr().out
    assert load_model(result["model"]).args.rope_scaling["rope_type"] == "yarn"


def test_longer_rows_do_not_stretch_a_checkpoint_by_themselves(folder, trained):
    with pytest.raises(ValueError, match=r"seq_len 100 is longer than .* 32: .*--model\.max_seq_len 100"):
        go_on(folder, trained, "--data.seq_len", "100")
    result = go_on(folder, trained, "--model.max_seq_len", "256", "--data.seq_len", "100")
    assert load_model(result["model"]).args.max_seq_len == 256


def test_the_context_of_a_new_model_is_the_length_of_its_rows(folder):
    assert load_model(run(folder)["model"]).args.max_seq_len == 16
    longer = run(folder, "--out", str(folder / "longer"), "--model.max_seq_len", "40")["model"]
    assert load_model(longer).args.max_seq_len == 40


def test_a_run_of_an_earlier_version_keeps_its_context(folder):
    old = ["--out", str(folder / "old")]
    run(folder, *old, "--model.max_seq_len", "256")  # what they set by default
    assert load_model(run(folder, *old, "--train.max_steps", "3")["model"]).args.max_seq_len == 256
    assert load_model(run(folder, *old, "--train.resume", "never")["model"]).args.max_seq_len == 16


def test_new_tokens_get_rows_and_are_saved(folder, trained, capsys):
    (folder / "tokens.txt").write_text("moonriver\nstarlight\n", "utf8")
    flags = ["--add_tokens", str(folder / "tokens.txt"), "--add_special_tokens", "<|tool|>", "<|call|>"]
    result = go_on(folder, trained, *flags, "--vocab_multiple_of", "64")
    old, new = load_tokenizer(trained), load_tokenizer(result["model"])
    assert "4 new tokens start as the mean of their spelling" in capsys.readouterr().out
    assert new.encode("a moonriver")[-1] == old.vocab_size + 2
    assert load_model(result["model"]).args.vocab_size == 384
    # Bins made with the tokenizer that has more train the model that has fewer: it grows by itself.
    add_tokens(old, ["moonriver"]).save(folder / "data" / "tokenizer")
    grown = go_on(folder, trained, "--out", str(folder / "third"))
    assert load_model(grown["model"]).args.vocab_size == old.vocab_size + 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model.dim", "320"], r"--model\.dim is 320, and the model in .* has 32: leave the flag out"),
        (["--model.rope_theta", "5e5"], r"--model\.rope_theta is 500000\.0, .*: change positions with --rope\.type"),
        (["--model.max_seq_len", "16"], r"is shorter than the checkpoint's 32"),
        (
            ["--rope.type", "yarn", "--rope.factor", "2", "--model.max_seq_len", "128"],
            r"factor 2 .* covers 64 positions",
        ),
        (["--add_tokens", "the", "the"], r"does not have as tokens, and no two alike, found .the."),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(folder, trained, flags, message):
    with pytest.raises(ValueError, match=message):
        go_on(folder, trained, *flags)
    assert not (folder / "second").exists()


def test_data_made_with_the_models_tokenizer_needs_none_of_its_own(folder, trained):
    shutil.rmtree(folder / "data" / "tokenizer")
    result = go_on(folder, trained)
    assert load_tokenizer(result["model"]).sha256() == load_tokenizer(trained).sha256()


def test_data_of_another_tokenizer_is_refused(folder, trained):
    add_tokens(load_tokenizer(trained), ["other"]).save(trained)
    with pytest.raises(ValueError, match=r"the tokenizer of .*data differs from that of the model in .*: id \d+ is"):
        go_on(folder, trained)


def test_changes_need_a_checkpoint(folder):
    with pytest.raises(SystemExit, match=r"--rope\.type yarn needs --init_from: it changes"):
        run(folder, "--rope.type", "yarn")


def test_another_causal_lm_goes_on(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(folder / "data" / "tokenizer")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    peer = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=tokenizer.vocab_size, **shape))
    peer.save_pretrained(folder / "neox")
    result = go_on(folder, str(folder / "neox"))
    again, info = transformers.AutoModelForCausalLM.from_pretrained(result["model"], output_loading_info=True)
    assert not any(info.values())
    assert not torch.equal(again.get_output_embeddings().weight, peer.get_output_embeddings().weight)
    with pytest.raises(ValueError, match="need a model of the LLaMA family, found --init_from"):
        go_on(folder, str(folder / "neox"), "--model.max_seq_len", "64")


def test_a_real_model_goes_on_at_twice_its_length(shared, tmp_path):
    """TinyStories' 260 thousand parameters, made for 512 tokens, on rows of 1024: a few steps help at that length."""
    directory = shared / "models" / "stories260K_hf"
    text = (shared / "pretrain" / "tinystories_sample.txt").read_text(encoding="utf8")[:300_000]
    (tmp_path / "text.txt").write_text(text, "utf8")
    flags = ["--input", str(tmp_path / "text.txt"), "--tokenizer", str(directory), "--out", str(tmp_path / "data")]
    data_process.main(parse(data_process.Args, "data_process", [*flags, "--corpus"]))
    load_tokenizer(directory).save(tmp_path / "data" / "tokenizer")
    before = load_model(directory)
    flags = ["--data.seq_len", "1024", "--model.max_seq_len", "1024", "--train.max_steps", "4", "--optim.lr", "1e-4"]
    result = go_on(tmp_path, str(directory), *flags, "--optim.warmup_steps", "0", "--optim.optimizer", "adamw")
    after = load_model(result["model"])
    assert (after.args.max_seq_len, after.args.vocab_size) == (1024, before.args.vocab_size)
    rows = torch.tensor(load_tokenizer(directory).encode(text)[: 4 * 1025]).view(4, 1025)
    before.args = before.args.replace(max_seq_len=1024)
    far = [
        model(rows[:, :-1], rows[:, 1:].where(torch.arange(1024) >= 700, -100))[0].item() for model in (before, after)
    ]
    assert far[1] < 0.98 * far[0]  # beyond its window the plain encoding does worse


# ---- a copy of a run


def copied(folder: Path, follow_links: bool) -> Path:
    """A finished run of four steps with checkpoints at each, copied as programs that know no links do."""
    every = ["--train.save_interval", "1", "--train.max_steps", "4"]
    run(folder, *every)
    copy = folder / "copy"
    links = ("last", "best") if not follow_links else ()
    shutil.copytree(folder / "run", copy, symlinks=False, ignore=shutil.ignore_patterns(*links))
    return copy


def test_a_run_copied_without_its_links_goes_on(folder, capsys):
    copy = copied(folder, follow_links=False)
    weights = load_model(folder / "run" / "last").state_dict()
    result = run(folder, "--train.save_interval", "1", "--train.max_steps", "4", "--out", str(copy))
    assert "there is no link `last`: from its newest checkpoint, step_00000004" in capsys.readouterr().err
    assert all(torch.equal(p, weights[name]) for name, p in load_model(result["model"]).state_dict().items())
    assert (copy / "last").resolve() == (copy / "best").resolve() == copy / "step_00000004"


def test_a_run_copied_with_its_links_followed_says_what_to_do(folder):
    copy = copied(folder, follow_links=True)
    with pytest.raises(ValueError, match=r"last should be a link .*: remove .*last and .*best, and the run goes on"):
        run(folder, "--train.save_interval", "1", "--train.max_steps", "4", "--out", str(copy))


def test_a_second_process_in_the_same_run_is_refused(folder):
    with (
        alone_in(folder / "run"),  # a lock is of who opened the folder, so one process will do
        pytest.raises(ValueError, match="another process is at work in"),
    ):
        run(folder)
    assert not (folder / "run" / "last").exists()

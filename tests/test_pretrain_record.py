"""The record of a run, its data, and the model that it starts from: what pretrain.py tells, keeps and refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.tiny_chat_model import chat_tokenizer

import pretrain
from bins.token_bin import BinWriter
from cli.args import parse
from training.identity import check_outside

SHAPE = "--model.dim 32 --model.n_layers 1 --model.n_heads 2 --model.multiple_of 8"
SMALL = f"{SHAPE} --data.seq_len 16 --data.batch_size 4 --train.compile off --train.device cpu --train.max_steps"


def write_bin(folder: Path, seed: int = 0) -> None:
    """60 documents in an order that the seed decides: bins of all seeds have the same lengths."""
    tokenizer = pretrain.load_tokenizer(folder / "data" / "tokenizer")
    order = np.random.default_rng(seed).permutation(60)
    with BinWriter(folder / "data" / "train", tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
        for i in order:
            writer.add([8 + int(i), 9, 10, 11, 12, 13, tokenizer.eos_id])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """data/ with tokenizer/ and train.bin."""
    chat_tokenizer(tmp_path).save(tmp_path / "data" / "tokenizer")
    write_bin(tmp_path)
    return tmp_path


def run(folder: Path, *flags: str, steps: int = 2, shape: bool = True) -> dict:
    where = ["--data.dir", str(folder / "data"), "--out", str(folder / "run")]
    given = [*SMALL.split(), str(steps)]
    return pretrain.main(parse(pretrain.Args, "pretrain", [*where, *given[0 if shape else 8 :], *flags]))


def records(folder: Path) -> list[bytes]:
    return [(folder / "run" / name).read_bytes() for name in ("config.yaml", "run.json")]


def test_a_finished_run_refuses_settings_that_it_would_not_use_and_keeps_its_record(folder):
    run(folder)
    before = records(folder)
    for flag, value in (("--optim.lr", "0.5"), ("--optim.weight_decay", "0.7"), ("--train.grad_clip", "9")):
        with pytest.raises(ValueError, match=rf"is finished \(2 steps\), and these .* not be used: {flag} {value}"):
            run(folder, flag, value)
    assert run(folder, "--train.log_interval", "7", "--train.save_interval", "3")["steps"] == 2
    assert records(folder) == before


def test_other_settings_of_a_run_that_goes_on_are_told_and_kept(folder, capsys):
    run(folder)
    lr = pretrain.Args().optim.lr
    run(folder, "--optim.lr", "0.5", "--train.save_interval", "9", steps=3)
    told = f"goes on after step 2 with other settings: --optim.lr 0.5 (before: {lr}), --train.max_steps 3 (before: 2)"
    assert told in capsys.readouterr().err
    run(folder, "--optim.lr", "0.5", steps=4)
    changes = json.loads((folder / "run" / "run.json").read_text())["changes"]
    first, second = {"optim.lr": [lr, 0.5], "train.max_steps": [2, 3]}, {"train.max_steps": [3, 4]}
    assert changes == [{"after_step": 2, "settings": first}, {"after_step": 3, "settings": second}]
    run(folder, "--train.resume", "never")
    assert "changes" not in json.loads((folder / "run" / "run.json").read_text())


def test_the_recorded_shape_is_that_of_the_model_and_starts_the_same_run(folder):
    run(folder)
    shutil.copytree(folder / "run", folder / "base", symlinks=True)
    shutil.rmtree(folder / "run")
    run(folder, "--init_from", str(folder / "base"), shape=False)  # a run, whose best is taken
    model = yaml.safe_load((folder / "run" / "config.yaml").read_text())["pretrain"]["model"]
    assert (model["dim"], model["n_layers"], model["n_heads"]) == (32, 1, 2)
    config = ["--config", str(folder / "run" / "config.yaml")]
    assert pretrain.main(parse(pretrain.Args, "pretrain", [*config, "--train.max_steps", "3"]))["steps"] == 3


def test_bins_of_the_same_lengths_in_another_order_are_refused(folder):
    run(folder)
    write_bin(folder, seed=1)
    with pytest.raises(ValueError, match=r"training data had other contents or another order, in train\.bin"):
        run(folder, steps=3)
    write_bin(folder)
    assert run(folder, steps=3)["steps"] == 3


def test_a_base_inside_the_run_that_replaces_it_is_refused(folder):
    run(folder)
    with pytest.raises(ValueError, match=r"lies in --out .*: choose another --out"):
        run(folder, "--init_from", str(folder / "run" / "best"), "--train.resume", "never", shape=False)
    (folder / "link").symlink_to(folder / "run" / "best")
    inside = folder / "run" / "step_00000002" / "merged"
    for source in (folder / "run", folder / "link", inside, folder / "other" / ".." / "run" / "last"):
        with pytest.raises(ValueError, match="choose another --out"):
            check_outside(folder / "run", source, "never")
    check_outside(folder / "run", folder / "run2" / "best", "never")
    check_outside(folder / "run" / "best" / "tuned", folder / "run" / "best", "never")
    assert (folder / "run" / "best" / "model.safetensors").is_file()


def test_a_mixture_trains_in_its_shares_and_its_checkpoints_tell_what_they_have_read(tmp_path):
    """Two directories, one of them in parts; the shares change on the way; the ledger counts both."""
    tokenizer = chat_tokenizer(tmp_path)
    for name in ("zh", "en/0", "en/1"):
        write = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "tokenizer_sha256": tokenizer.sha256()}
        with BinWriter(tmp_path / name / "train_00000", **write) as writer:
            for i in range(40):
                writer.add([8 + i, 9, 10, tokenizer.eos_id], name[:2])
    tokenizer.save(tmp_path / "zh" / "tokenizer")
    mix = ["--data.mix", str(tmp_path / "zh"), "0.75,0.25@0.5", str(tmp_path / "en"), "0.25,0.75@4"]
    flags = [*SMALL.split(), "8", "--train.save_interval", "4", "--out", str(tmp_path / "run"), *mix]
    pretrain.main(parse(pretrain.Args, "pretrain", flags))
    for step, shares in ((4, (0.75, 0.25)), (8, (0.5, 0.5))):
        ledger = tmp_path / "run" / f"step_{step:08d}" / "training_state" / "ledger.json"
        rows = json.loads(ledger.read_text())
        read = {name: sum(row["read"] for row in rows if row["source"] == name) for name in ("zh", "en")}
        assert read == {"zh": shares[0] * step * 64, "en": shares[1] * step * 64}
    again = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["pretrain"]["data"]["mix"]
    assert again == {str(tmp_path / "zh"): "0.75,0.25@0.5", str(tmp_path / "en"): "0.25,0.75@4"}
    with pytest.raises(ValueError, match=r"a run with mix .*: it cannot be continued"):
        pretrain.main(parse(pretrain.Args, "pretrain", [*flags[:-1], "0.5"]))
    with pytest.raises(SystemExit, match=r"does not go with --data.weights"):
        parse(pretrain.Args, "pretrain", [*flags, "--data.weights", "1"])

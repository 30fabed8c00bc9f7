"""What fine_tuning.py makes of its inputs before it hands them to the loop, and what it refuses."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_chat_model import save_chat_model

import convert
import fine_tuning
from chat.template import load_template
from cli.args import parse
from serving.assistant import load_assistant
from tokenizer import load_tokenizer
from tuning.args import DataArgs

SMALL = "--data.seq_len 64 --data.batch_size 2 --train.max_steps 2 --train.compile off --train.device cpu"
GOOD = {"messages": [{"role": "user", "content": "moon?"}, {"role": "assistant", "content": "the moon"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """model/, and train.jsonl with one record that is no conversation."""
    save_chat_model(tmp_path / "model")
    records = [GOOD] * 4 + [{"question": "without an answer"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def run(folder: Path, *flags: str) -> dict:
    where = ["--init_from", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--out", str(folder / "run")]
    return fine_tuning.main(parse(fine_tuning.Args, "fine_tuning", [*where, *SMALL.split(), *flags]))


def test_broken_records_are_kept_aside_and_missing_held_out_ones_mentioned(folder, capsys):
    assert run(folder, "--data.heldout", str(folder / "heldout.jsonl"))["steps"] == 2
    (record,) = map(json.loads, (folder / "run" / "broken_train.jsonl").read_text().splitlines())
    assert record["where"] == f"{folder / 'train.jsonl'}:5" and "no question and answer" in record["reason"]
    said = capsys.readouterr().err
    assert "1 broken record is kept aside" in said
    assert f"there is no {folder / 'heldout.jsonl'}: nothing is evaluated" in said


def test_a_share_is_held_out_by_hash_when_no_file_is_given(folder, capsys):
    asked = [[{"role": "user", "content": f"{n}?"}, GOOD["messages"][1]] for n in range(100)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in asked))
    measures = run(folder, "--data.heldout_share", "0.2")
    said = capsys.readouterr().err
    n_trained, n_held_out = (
        int(re.search(rf"{word}: (\d+) conversations", said)[1]) for word in ("train.jsonl", "held out to evaluate on")
    )
    assert n_trained + n_held_out == 100 and 8 < n_held_out < 32  # four standard deviations about 20
    assert "20 % of" in said and measures["steps"] == 2
    run(folder, "--data.heldout_share", "0", "--train.resume", "never")
    assert "none of the conversations are held out: nothing is evaluated during training\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "how, told",
    [
        ("cut", "2 are cut at the end. --data.seq_len "),
        ("drop", "2 are skipped (--data.too_long cut would keep the beginning). --data.seq_len "),
    ],
)
def test_what_rows_are_too_short_for_is_told(folder, capsys, how, told):
    path = folder / "long.jsonl"
    records = [{"question": f"{n}?", "answer": "the moon " * (30 if n < 2 else 1)} for n in range(8)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--data.train", str(path), "--data.too_long", how, "--data.heldout_share", "0"]
    run(folder, *flags)
    said = capsys.readouterr().err
    assert f"{path}: 25 % of the conversations are longer than a row of 64 tokens: {told}" in said
    run(folder, *flags, "--data.seq_len", "128", "--train.resume", "never")
    assert "are longer than" not in capsys.readouterr().err


def test_answers_beyond_the_rows_are_told_and_untrained_ones_are_not(folder, capsys):
    path = folder / "long.jsonl"
    untrained = {"messages": [GOOD["messages"][0], GOOD["messages"][1] | {"loss": False}]}
    beyond = {"question": "moon? " * 30, "answer": "the moon"}
    flags = ["--data.train", str(path), "--data.heldout_share", "0"]
    path.write_text("".join(json.dumps(record) + "\n" for record in [GOOD] * 2 + [untrained, beyond]))
    run(folder, *flags)
    said = capsys.readouterr().err
    assert "25 % of the conversations are longer" in said and "tokens: 1 is skipped (the answer begins after" in said
    assert f"{path}: 4 conversations, " in said and "1 conversation without an answer to train is skipped." in said
    path.write_text("".join(json.dumps(record) + "\n" for record in [GOOD] * 2 + [untrained] * 2))
    run(folder, *flags, "--train.resume", "never")
    said = capsys.readouterr().err
    assert "2 conversations without an answer to train are skipped." in said and "are longer than" not in said


def test_what_it_is_trained_with_is_what_it_is_saved_with(folder):
    run(folder, "--data.template", "plain")
    tokenizer = load_tokenizer(folder / "run" / "last")
    assert (
        load_template(tokenizer).jinja
        == load_template(tokenizer, "plain").jinja
        != load_template(tokenizer, "ours").jinja
    )


def test_new_tokens_make_a_template_fit(folder, capsys):
    markers = ["--add_special_tokens", "<|im_start|>", "<|im_end|>"]
    before = load_tokenizer(folder / "model").vocab_size
    with pytest.raises(SystemExit, match=r"convert\.py tokens --model"):  # an adapter's base has them already
        run(folder, *markers, "--lora.method", "lora")
    run(folder, "--data.template", "chatml", *markers)
    assert (
        f"2 new tokens start as the mean of their spelling; rows: {before} -> {before + 2}" in capsys.readouterr().err
    )
    tokenizer = load_tokenizer(folder / "run" / "last")
    assert tokenizer.special["<|im_end|>"] == before + 1
    assert load_template(tokenizer).stop_ids[-1] == before + 1
    with pytest.raises(ValueError, match="holds a run with add_tokens"):
        run(folder, "--data.template", "chatml", *markers, "<|tool|>")
    where = ["--model", str(folder / "model"), "--out", str(folder / "more")]
    convert.tokens(parse(convert.Tokens, "convert", [*where, *markers]))
    adapted = ["--init_from", str(folder / "more"), "--out", str(folder / "adapter"), "--lora.method", "lora"]
    assert run(folder, "--data.template", "chatml", *adapted)["steps"] == 2
    assert load_assistant(folder / "adapter" / "last", torch.device("cpu"), torch.float32).stop.ids[-1] == before + 1


def test_the_same_conversations_from_another_model_are_another_run(folder):
    run(folder)
    (folder / "model").rename(folder / "moved")
    moved = ("--init_from", str(folder / "moved"))
    assert run(folder, *moved)["steps"] == 2  # finished, wherever the model lies
    save_chat_model(folder / "moved", n_layers=1)
    with pytest.raises(ValueError, match=r"holds a run with init_from .*--train\.resume never"):
        run(folder, *moved)
    assert run(folder, *moved, "--train.resume", "never")["steps"] == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--init_from", "nowhere"], r"nowhere is no model directory"),
        (["--data.template", "our"], r"unknown chat template 'our'; did you mean 'ours'\?"),
        (["--data.template", "chatml"], r"chatml needs the special tokens <\|im_start\|>, .*--add_special_tokens"),
        (["--data.heldout_share", "1"], r"heldout_share should be from 0 to below 1, found 1"),
        (["--data.train", "nowhere"], r"nowhere: no file or folder of this name"),
        (["--data.temperature", "2"], r"--data\.temperature needs several tasks, found one path in --data: remove it"),
        (
            ["--data.coba_tau", "2", "--data.coba_warmup", "3"],
            r"coba_warmup 3 and --data\.coba_tau 2\.0 need --data\.loss coba",
        ),
        (
            ["--data.coba_tau", "2", "--data.loss", "sample"],
            r"coba_tau 2\.0 needs --data\.loss coba, found sample: .* CoBa",
        ),
        (["--data.heldout_share", "0.9999"], r"--data\.heldout_share 0\.9999 holds out every record; lower it"),
        (
            ["--data.seq_len", "4"],
            r"no conversation has an answer within 4 tokens; --data\.seq_len \d+ ",
        ),
        (["--data.seq_len", "201"], r"seq_len 201 is longer than the model's max_seq_len 200"),
    ],
)
def test_refused_before_anything_is_written(folder, flags, message):
    with pytest.raises((ValueError, FileNotFoundError, SystemExit), match=message):
        run(folder, *flags)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"heldout_share": 1.0},
        {"temperature": math.nan},
        {"temperature": 2.0},
        {"loss": "task_token", "weights": (-1.0,)},
        {"loss": "task_token", "weights": (math.inf,)},
        {"heldout": (Path("a"), Path("b"))},
    ],
)
def test_numbers_are_checked_before_anything_is_loaded(wrong):
    with pytest.raises(ValueError, match=f"--data.{list(wrong)[-1]} "):
        DataArgs(**wrong)


def test_of_several_tasks_those_without_their_held_out_file_are_named(folder):
    there = folder / "train.jsonl"
    train = (there, folder / "model")
    with pytest.raises(ValueError, match=r"for each of 2 tasks; there is no nowhere$"):
        DataArgs(train, heldout=(there, Path("nowhere")))
    DataArgs(train, heldout=(there, there), loss="coba", coba_tau=1.0, temperature=2.0)
    DataArgs(train[:1], heldout=(Path("nowhere"),))


def test_a_run_goes_on_only_with_the_records_it_began_with(folder):
    asked = [[{"role": "user", "content": f"{n}?"}, GOOD["messages"][1]] for n in range(8)]

    def write(messages: list) -> None:
        (folder / "train.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))

    write(asked)
    settings = ["--data.heldout_share", "0"]
    run(folder, *settings)
    edited = [{"role": "user", "content": "9?"}, GOOD["messages"][1]]  # of as many tokens
    for other in ([*asked[1:], asked[0]], [*asked[:7], edited]):
        write(other)
        with pytest.raises(ValueError, match=r"training data had other contents or another order, in train: it cannot"):
            run(folder, *settings, "--train.max_steps", "3")
    write(asked)
    assert run(folder, *settings, "--train.max_steps", "3")["steps"] == 3
    with pytest.raises(
        ValueError, match=r"is finished \(3 steps\), and these settings would not be used: --optim\.lr 0\.5"
    ):
        run(folder, *settings, "--train.max_steps", "3", "--optim.lr", "0.5")
    with pytest.raises(ValueError, match=r"--init_from .*/best lies in --out .*: choose another --out"):
        run(folder, "--init_from", str(folder / "run"), "--train.resume", "never")


def test_a_run_under_a_template_with_the_date_goes_on_another_day(folder):
    """Llama 3's template writes the date into every prompt: a run keeps that of its first day."""
    file = folder / "dated.jinja"
    own = load_template(load_tokenizer(folder / "model")).jinja
    file.write_text("{{- strftime_now('%d %b %Y') -}}\n" + own)
    (folder / "run").mkdir()
    record = folder / "run" / "run.json"
    record.write_text(json.dumps({"began": "2020-01-02T03:04:05"}))
    run(folder, "--data.template", str(file))
    assert json.loads(record.read_text())["began"] == "2020-01-02T03:04:05"
    assert run(folder, "--data.template", str(file), "--train.max_steps", "3")["steps"] == 3
    record.write_text("{}")  # without it, today's ids are other ones
    with pytest.raises(ValueError, match="data"):
        run(folder, "--data.template", str(file), "--train.max_steps", "3")

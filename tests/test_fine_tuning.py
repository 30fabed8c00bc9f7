"""What fine_tuning.py makes of its inputs before it hands them to the loop, and what it refuses."""

import json
from pathlib import Path

import pytest
from tiny_chat import save_chat_model

import config
import fine_tuning

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
    where = ["--init_from", str(folder / "model"), "--data.train", str(folder / "train.jsonl")]
    where += ["--data.heldout", str(folder / "heldout.jsonl"), "--out", str(folder / "run")]
    return fine_tuning.main(config.parse(fine_tuning.Args, "fine_tuning", [*where, *SMALL.split(), *flags]))


def test_broken_records_are_kept_aside_and_missing_held_out_ones_mentioned(folder, capsys):
    assert run(folder)["steps"] == 2
    (record,) = map(json.loads, (folder / "run" / "broken_train.jsonl").read_text().splitlines())
    assert record["where"] == f"{folder / 'train.jsonl'}:5" and "no question and answer" in record["reason"]
    said = capsys.readouterr().out
    assert "1 broken records kept aside" in said
    assert f"there is no {folder / 'heldout.jsonl'}: nothing is evaluated" in said


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
        (["--data.train", "nowhere"], r"there is no file or folder nowhere"),
        (["--data.seq_len", "4"], r"no conversation has an answer within 4 tokens; raise --data\.seq_len"),
        (["--data.seq_len", "201"], r"seq_len 201 is longer than the model's max_seq_len 200"),
    ],
)
def test_refused_before_anything_is_written(folder, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(folder, *flags)
    assert not (folder / "run").exists()

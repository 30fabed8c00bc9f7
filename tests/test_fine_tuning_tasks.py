"""fine_tuning.py on several tasks: what it trains, what it tells, and that it goes on bit for bit."""

import json
import re
from pathlib import Path

import pytest
from helpers.tiny_chat_model import save_chat_model

import fine_tuning
from cli.args import parse
from corpora.registry import stable_share
from training import log as training_log
from training import trainer
from training.log import read_metrics
from training.state import load_state

SMALL = """--data.seq_len 64 --data.batch_size 4 --train.max_steps 8 --train.compile off --train.device cpu
    --train.log_interval 1 --train.eval_interval 3 --train.eval_batches 0 --data.heldout_share 0.25"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(trainer, "peak_flops", lambda *_: (1e12, "not measured"))
    monkeypatch.setattr(training_log, "draw_losses", lambda *_: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """model/, and two tasks: the folder moon/ with 24 conversations, sun.jsonl with 8 short ones."""
    save_chat_model(tmp_path / "model")
    (tmp_path / "moon").mkdir()
    for path, n, answer in (
        (tmp_path / "moon" / "x.jsonl", 24, "the moon over the river"),
        (tmp_path / "sun.jsonl", 8, "sun"),
    ):
        records = [{"question": f"{n}?", "answer": f"{answer} {n}"} for n in range(n)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def run(folder: Path, out: str, *flags: str) -> dict:
    where = f"--init_from {folder}/model --data {folder}/moon,{folder}/sun.jsonl --out {folder}/{out}"
    return fine_tuning.main(parse(fine_tuning.Args, "fine_tuning", [*where.split(), *SMALL.split(), *flags]))


def test_preset(folder):
    preset = Path(fine_tuning.__file__).parent / "configs/fine_tuning/tasks.yaml"
    result = run(folder, "run", "--config", str(preset))
    assert result["task_mean"] == pytest.approx((result["loss/moon"] + result["loss/sun"]) / 2)
    logged = {row["step"]: row["eval_task_mean"] for row in rows(folder / "run") if "eval_task_mean" in row}
    best = (folder / "run" / "best").resolve().name
    assert best == f"step_{min(logged, key=logged.get):08d}"


def rows(out: Path) -> list[dict]:
    return [row for row in read_metrics(out / "metrics.jsonl") if "mfu" not in row]


@pytest.mark.parametrize("loss", ["token", "sample", "task_token", "task_sample", "coba"])
@pytest.mark.parametrize("packing", ["best_fit", "concat", "bucket", "none"])
def test_every_loss_and_packing_trains_and_tells_the_tasks_apart(folder, loss, packing, capsys):
    flags = ("--data.loss", loss, "--data.packing", packing, "--data.temperature", "2")
    result = run(folder, "run", *flags, *(("--data.coba_warmup", "2") if loss == "coba" else ()))
    trained = [row for row in rows(folder / "run") if "loss" in row]
    assert len(trained) == 8
    assert {"loss/moon", "loss/sun"} < set().union(*trained)
    assert {"loss", "loss/moon", "loss/sun", "bits_per_byte"} < result.keys()
    assert result["loss"] < trained[0]["loss"]
    weights = [row["weight/sun"] for row in rows(folder / "run") if "weight/sun" in row]
    assert len(weights) == (8 if loss == "coba" else 0)
    said = capsys.readouterr()
    filler = "Packing" if packing in ("best_fit", "concat") else "Padding"
    assert f"{filler} wastes " in said.err and "moon " in said.err and "sun " in said.err


@pytest.mark.parametrize("loss", ["task_sample", "coba"])
def test_goes_on_bit_for_bit(folder, loss, monkeypatch):
    flags = ("--data.loss", loss, "--train.save_interval", "2", "--train.patience", "9", "--train.metric", "loss/sun")
    flags += ("--data.coba_warmup", "2") if loss == "coba" else ()
    run(folder, "whole", *flags)
    step = trainer.Trainer._step

    def killed(self):
        if self.state.step == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "cut", *flags)
    assert ("adaptive" in load_state(folder / "cut" / "last")) == (loss == "coba")
    monkeypatch.setattr(trainer.Trainer, "_step", step)
    run(folder, "cut", *flags)
    assert rows(folder / "cut") == rows(folder / "whole")
    a, b = ((folder / name / "last" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b
    with pytest.raises(ValueError, match="holds a run with loss"):
        run(folder, "cut", "--data.loss", "sample")


def test_weights_change_the_loss_and_held_out_files_belong_to_tasks(folder, capsys):
    first = {}
    for weights in ("1 1", "9 1"):
        run(
            folder,
            weights[0],
            "--train.max_steps",
            "1",
            "--data.loss",
            "task_token",
            "--data.weights",
            *weights.split(),
        )
        first[weights] = rows(folder / weights[0])[0]
    for weights, row in first.items():
        moon, sun = map(float, weights.split())
        mean = (moon * row["loss/moon"] + sun * row["loss/sun"]) / (moon + sun)
        assert row["loss"] == pytest.approx(mean, rel=1e-6)  # float32 weights
    held_out = f"{folder}/sun.jsonl,{folder}/moon"
    result = run(
        folder, "swapped", "--train.max_steps", "1", "--data.heldout_share", "0.02", "--data.heldout", held_out
    )
    assert "held out to evaluate on: 8 + 24 conversations" in capsys.readouterr().err
    assert {"loss/moon", "loss/sun"} < result.keys()


@pytest.fixture
def unmeasured(folder) -> Path:
    """Of the task sun nothing is held out: no hash of its questions is among the lowest tenth."""
    questions = [f"{n}?" for n in range(200) if stable_share(f"{n}?") >= 0.1][:8]
    records = [{"question": question, "answer": "sun"} for question in questions]
    (folder / "sun.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_task_without_held_out_samples_is_named(unmeasured, capsys):
    result = run(unmeasured, "run", "--data.heldout_share", "0.1")
    assert (
        "no sample of sun is held out: measurements during training leave it out; raise --data.heldout_share"
        in capsys.readouterr().err
    )
    assert result["task_mean"] == result["loss/moon"]
    assert "loss/sun" not in result


@pytest.mark.parametrize("flags", ["--train.metric loss/sun", "--data.loss coba"])
def test_a_task_without_held_out_samples_cannot_lead(unmeasured, flags):
    with pytest.raises(
        ValueError,
        match=rf"^{flags} needs held-out samples of .*, and no sample of sun is held out: raise --data\.heldo",
    ):
        run(unmeasured, "run", "--data.heldout_share", "0.1", *flags.split())
    assert not (unmeasured / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data.weights 1 2", r"--data\.weights needs --data\.loss task_token or task_sample, found token"),
        ("--data.weights 1 --data.loss task_token", r"should be 2 numbers of 0 or more, not all of them 0, found 1\.0"),
        ("--data.weights 0 0 --data.loss task_token", r"not all of them 0, found 0\.0 0\.0"),
        ("--train.metric task_mean --data.heldout_share 0", r"needs --data\.heldout_share above 0, found 0"),
        ("--data.temperature 0.5", r"temperature should be 1 \(no upsampling\) or more, found 0\.5"),
        ("--data.heldout sun.jsonl", r"one path for each of 2 tasks, found 1"),
        ("--train.metric loss/star", r"one of loss, bits_per_byte, task_mean, loss/moon, loss/sun, found 'loss/star'"),
    ],
)
def test_refused_before_anything_is_written(folder, flags, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as refused:
        run(folder, "run", *flags.split())

    assert re.search(message, str(refused.value) + capsys.readouterr().err)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--train.backend ddp", "is started by torchrun"),
        ("--data.seq_len 201", "seq_len 201 is longer than the model's max_seq_len 200"),
        ("--lora.method lora --lora.targets atention", "no layer matches the target 'atention'"),
    ],
)
def test_what_is_wrong_without_the_data_is_told_before_they_are_read(folder, flags, message, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=message):
        run(folder, "run", "--data.train", "nowhere", *flags.split())

"""What a run leaves to be read, and what a resumed one keeps of it."""

import json
import math
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import log as training_log
from training.log import RunLog, draw_losses, read_metrics, summary


@pytest.fixture
def pictures(monkeypatch) -> list:
    """The calls of `draw_losses`, which takes most of a second."""
    calls = []
    monkeypatch.setattr(training_log, "draw_losses", lambda *args: calls.append(args))
    return calls


def test_rows_go_to_the_file_at_once_and_to_tensorboard(tmp_path, pictures):
    log = RunLog(tmp_path / "run", 0, 10)
    log.write(1, {"loss": 0.1 + 0.2, "lr": 1e-3})
    log.write(2, {"loss": 5e-324})
    rows = [{"step": 1, "loss": 0.1 + 0.2, "lr": 1e-3}, {"step": 2, "loss": 5e-324}]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == rows  # every bit, before anything is closed
    log.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, pytest.approx(0.3)), (2, 0)]
    assert events.Tags()["scalars"] == ["loss", "lr"]
    assert pictures == [({"": tmp_path / "run" / "metrics.jsonl"}, tmp_path / "run" / "loss.png")]


def test_a_resumed_run_forgets_what_comes_after_its_step(tmp_path, pictures):
    log = RunLog(tmp_path, 0, 10)
    for step in range(1, 8):
        log.write(step, {"loss": float(step)})
    log.close()
    time.sleep(1.1)  # TensorBoard orders the files of one second by a counter read as text: 10 comes before 9
    log = RunLog(tmp_path, 4, 10)
    log.write(5, {"loss": 50.0})
    log.close()
    expected = [1.0, 2.0, 3.0, 4.0, 50.0]
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == expected
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [e.value for e in scalars] == expected


def test_a_new_run_starts_an_empty_file(tmp_path, pictures):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    RunLog(tmp_path, 0, 10).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_cut_off_by_a_kill_is_left_out_and_gone_after_resuming(tmp_path, pictures):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert math.isnan(rows[1]["loss"])
    log = RunLog(tmp_path, 2, 10)
    log.write(3, {"loss": 3.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_another_rank_writes_and_says_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", 0, 10, active=False)
    log.write(1, {"loss": 1.0})
    log.say("hello")
    log.progress(1, {"loss": "1"})
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert "".join(capsys.readouterr()) == ""


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys, pictures):
    log = RunLog(tmp_path, 0, 10)
    log.say("hello")
    log.progress(4, {"loss": "1.5", "left": "2m"})
    log.close()
    assert capsys.readouterr().err == "hello\nstep 4/10 loss 1.5 left 2m\n"


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys, pictures):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    log = RunLog(tmp_path, 0, 10)
    log.progress(4, {"loss": "1.5"})
    log.say("hello")
    log.close()
    err = capsys.readouterr().err
    assert "hello\n" in err
    assert "loss 1.5" in err
    assert "4/10" in err


def test_picture_of_several_runs_some_of_them_empty(tmp_path):
    for name, rows in {"a": [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5}], "b": []}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_losses({name: tmp_path / f"{name}.jsonl" for name in "ab"}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_last_line_of_a_run_names_the_best_checkpoint():
    result = {"steps": 1200, "tokens": 5, "model": "run/best", "loss": 4.469, "bits_per_byte": 2.0841}
    best = "Best checkpoint: run/best; on all held-out data: loss 4.4690, bits per byte 2.0841."
    assert summary(result) == f"Finished after 1,200 steps. {best}"
    assert summary({"steps": 3, "tokens": 5, "model": "run/last"}).endswith(
        "Model: run/last (no held-out data to compare on)."
    )


def test_a_damaged_line_costs_only_itself(tmp_path, pictures):
    log = RunLog(tmp_path, 0, 10)
    for step in range(1, 8):
        log.write(step, {"loss": float(step)})
    log.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[2], lines[3], lines[4], lines[5] = b"\0" * 20, b"\xff\xfe{", b"[5]", b'{"step": "6"}'
    path.write_bytes(b"\n".join(lines) + b"\n" + b'{"step": 8, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 7]
    RunLog(tmp_path, 7, 10).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 7]


def test_the_row_of_an_evaluation_that_is_done_again_is_removed(tmp_path, pictures):
    log = RunLog(tmp_path, 0, 4)
    for step, name in ((2, "loss"), (2, "eval_loss"), (4, "loss"), (4, "eval_loss")):
        log.write(step, {name: 1.0})
    log.close()
    RunLog(tmp_path, 4, 4, evaluated=4).close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    RunLog(tmp_path, 4, 4, evaluated=2).close()
    assert [(r["step"], "loss" in r) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        *((2, True), (2, False), (4, True))
    ]


@pytest.mark.parametrize("damage, rows", [(b"", None), (b"7.25", 5), (b"{{", 4)], ids=["none", "a digit", "no JSON"])
def test_a_damaged_log_is_named_when_the_run_goes_on(tmp_path, pictures, capsys, damage, rows):
    log = RunLog(tmp_path, 0, 10)
    for step in range(1, 6):
        log.write(step, {"loss": step + 0.25})
    contents = log.contents()
    log.write(6, {"loss": 1.0})  # after the checkpoint
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"3.25", damage or b"3.25"))
    again = RunLog(tmp_path, 5, 10)
    again.compare(contents)
    again.close()
    said = capsys.readouterr().err
    assert (f"metrics.jsonl is damaged: {rows} of its 5 rows up to step 5" in said) == bool(damage)
    assert again.contents() == contents or damage

"""data_process.py run again: with nothing to do, with other arguments, after kills, Ctrl-C and a full disk."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.data_process_runs import Runs, contents, write_texts
from helpers.tiny_texts import made_up_texts, train_tiny_tokenizer

import data_process
from bins import screen
from bins.token_bin import TokenBin
from cli import progress
from corpora import SourceArgs
from files import alone_in

REPOSITORY = Path(data_process.__file__).parent


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(screen, "BATCH_ITEMS", 5)


@pytest.fixture
def make(tmp_path, tokenizer_path) -> Runs:
    return Runs(tmp_path, tokenizer_path)


# --- going on and starting over ---------------------------------------------------------------------------------------


def test_a_second_run_has_nothing_to_do(make, monkeypatch, capsys):
    texts = made_up_texts(40)
    out, summary = make(texts)
    before, dates = contents(out), {p: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.setattr(data_process, "process", None)
    assert make(texts, processes=2)[1] == summary
    assert "nothing to do" in capsys.readouterr().out
    assert contents(out) == before and {p: p.stat().st_mtime_ns for p in out.iterdir()} == dates


def test_a_file_that_is_gone_is_made_again(make):
    texts = made_up_texts(40)
    out, _ = make(texts)
    before = contents(out)
    (out / "heldout.bin").unlink()
    (out / "train_00000.idx").write_bytes(b"")
    make(texts)
    assert contents(out) == before


def test_other_arguments_are_refused_until_told_to_overwrite(make):
    texts = made_up_texts(60)
    out, _ = make(texts, tokens_per_file=500, save_all_text=True)
    before = contents(out)
    with pytest.raises(
        ValueError, match=r"made with other min_chars, save_all_text, tokens_per_file;.*--overwrite true"
    ):
        make(texts, min_chars=12)
    with pytest.raises(ValueError, match=r"made with other inputs;"):
        make([*texts, "and one text more"], tokens_per_file=500, save_all_text=True)
    assert contents(out) == before
    make(texts, min_chars=12, overwrite=True)
    fresh, _ = make(texts, "fresh", min_chars=12)
    assert contents(out) == contents(fresh)


def test_bins_of_other_origin_are_not_replaced_unasked(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_00000.bin").write_bytes(b"\1\0\2\0")
    (tmp_path / "out" / "train_poems.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="made by another program"):
        make(made_up_texts(30))
    out, _ = make(made_up_texts(30), overwrite=True)
    assert (out / "train_poems.bin").read_bytes() == b"mine" and len(TokenBin(out / "train_00000.bin")) > 2


def test_an_unfinished_run_continues_or_is_dropped_only_with_overwrite(make, monkeypatch, capsys):
    texts = made_up_texts(60)
    fresh, _ = make(texts, "fresh", tokens_per_file=500)
    with monkeypatch.context() as patch:
        patch.setattr(data_process, "write_conversations", lambda *_: 1 / 0)  # stands for a kill just before the end
        with pytest.raises(ZeroDivisionError):
            make(texts, tokens_per_file=500)
    with pytest.raises(ValueError, match=r"unfinished run with other tokens_per_file;.*--overwrite true"):
        make(texts, tokens_per_file=600)
    out, _ = make(texts, tokens_per_file=500)
    assert "continuing" in capsys.readouterr().err and contents(out) == contents(fresh)
    assert not (out / "data_process.part").exists()


def test_a_second_process_is_kept_out_of_the_same_folder(make, tmp_path):
    with alone_in(tmp_path / "out"), pytest.raises(ValueError, match=r"another process is at work in .*out"):
        make(made_up_texts(30))
    assert not list((tmp_path / "out").iterdir())


# --- real processes ---------------------------------------------------------------------------------------------------

# The script as it is run, with batches so small that a small corpus has many.
SCRIPT = """
import bins.screen
bins.screen.BATCH_ITEMS = 4
import cli.args, data_process
cli.args.run(data_process.main, cli.args.parse(data_process.Args, "data_process"))
"""
SLOW_LOADER = """
import json, os, time
def data_loader():
    for line in open({path!r}):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        yield json.loads(line)
"""


def start(*words: object, pause: float = 0, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "PAUSE": str(pause), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out + err


def test_what_is_read_again_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0)
    batches = [screen.ScreenedBatch(end) for end in (5, 10, 15, 20)]
    assert [batch.end for batch in data_process.skip_written(batches, 10)] == [15, 20]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "reading finished records again: 5 of 10 records",
        "reading finished records again: 10 of 10 records",
    ]
    assert [batch.end for batch in data_process.skip_written(batches, 0)] == [5, 10, 15, 20]
    assert capsys.readouterr().err == ""


def test_killed_again_and_again_the_bytes_are_those_of_an_uninterrupted_run(make, tmp_path, tokenizer_path):
    """SIGKILL where a third and where two thirds of the bins are there; finished bins are not written again."""
    texts = made_up_texts(160)
    write_texts(tmp_path / "texts.jsonl", [None, "short", *texts[:120], texts[0], None, *texts[120:], texts[150], None])
    loader = tmp_path / "slow.py"
    loader.write_text(SLOW_LOADER.format(path=str(tmp_path / "texts.jsonl")))
    settings = {"tokens_per_file": 1000, "save_all_text": True}
    whole, _ = make(None, "whole", source=SourceArgs(loader=loader), **settings)
    n_bins = len(list(whole.glob("train_*.bin")))
    assert n_bins > 6
    out = tmp_path / "out"
    words = ["--loader", loader, "--tokenizer", tokenizer_path, "--out", out, "--held_out", 0.1]
    words += ["--tokens_per_file", 1000, "--save_all_text", True]
    kept = {}
    for part, processes in ((n_bins // 3, 2), (2 * n_bins // 3, 1)):
        process = start(*words, "--processes", processes, pause=0.01)
        awaited = out / "data_process.part" / f"train_{part:05d}.json"
        deadline = time.monotonic() + 60
        while not awaited.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, said = process.communicate(timeout=20)
        assert ("continuing" in said) == bool(kept) and not list(out.glob("*.bin"))
        assert not psutil.wait_procs(workers, timeout=20)[1]  # the workers end with the one who started them
        finished = {p: p.stat().st_mtime_ns for p in (out / "data_process.part").glob("train_*.bin")}
        assert kept.items() <= finished.items()
        kept = {p: date for p, date in finished.items() if p.name < f"train_{part:05d}.bin"}
    assert "continuing" in finish(start(*words, "--processes", 1))
    assert contents(out) == contents(whole)
    assert all((out / path.name).stat().st_mtime_ns == date for path, date in kept.items())


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(make, tmp_path, tokenizer_path):
    settings = {"tokens_per_file": 2000, "save_all_text": True}
    whole, _ = make(made_up_texts(200), "whole", **settings)
    words = ["--input", tmp_path / "texts.jsonl", "--tokenizer", tokenizer_path, "--out", tmp_path / "out"]
    words += ["--held_out", 0.1, "--tokens_per_file", 2000, "--save_all_text", True, "--processes", 1]
    # No file may grow beyond 20 kB: what a disk without room is to a program.
    full = start(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2))
    _, err = full.communicate()
    assert full.returncode == 1 and re.fullmatch(r"error: .*data_process.part: the disk is full .*\n", err), err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data_process.part"]
    assert "continuing" in finish(start(*words))
    assert contents(tmp_path / "out") == contents(whole)


def test_ctrl_c_ends_at_once_and_quietly(tmp_path, tokenizer_path):
    write_texts(tmp_path / "texts.jsonl", made_up_texts(400))
    (tmp_path / "slow.py").write_text(SLOW_LOADER.format(path=str(tmp_path / "texts.jsonl")))
    words = ["--loader", tmp_path / "slow.py", "--tokenizer", tokenizer_path, "--out", tmp_path / "out"]
    process = start(*words, "--processes", 2, "--tokens_per_file", 500, pause=0.02, start_new_session=True)
    while not (tmp_path / "out" / "data_process.part" / "train_00000.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == ""

"""How a script ends: an error that a user can mend is one sentence, and our own mistakes keep their traceback."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import pretrain
from cli.args import parse, run


@dataclass(frozen=True)
class Args:
    """A script of a test."""

    flag: bool = False
    """a switch"""


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("two\n  lines"), "error: two lines"),
        (FileNotFoundError("no such bin"), "error: no such bin"),
        (FileNotFoundError(2, "No such file", "x.bin"), "error: No such file: x.bin"),
        (
            OSError(28, "No space left on device"),
            "error: no space left on the disk (No space left on device); free some space, "
            "then repeat the command to continue",
        ),
        (
            OSError(30, "Read-only file system", "out"),
            "error: no access to out (Read-only file system); choose another place, or change its permissions",
        ),
        (ValueError("found " + "x" * 10_000), f"error: found {'x' * 594} ... {'x' * 600}"),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
    ],
)
def test_errors_a_user_can_mend_become_one_sentence(monkeypatch, error, code):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(SystemExit) as stop:
        run(main, parse(Args, "pretrain"))
    assert stop.value.code == code


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def main(args):
        raise KeyError("a bug")

    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(KeyError):
        run(main, parse(Args, "pretrain"))


def test_the_word_that_the_deepspeed_launcher_adds_is_left_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--local_rank=1", "--train.seed", "3"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parse(pretrain.Args, "pretrain").train.seed == 3
    monkeypatch.delenv("LOCAL_RANK")  # typed by hand it is a flag that does not exist
    with pytest.raises(SystemExit, match="--local_rank is no flag"):
        parse(pretrain.Args, "pretrain")


def test_a_reader_that_ends_ends_the_script_without_a_word():
    read, write = os.pipe()
    os.close(read)
    script = Path(pretrain.__file__).with_name("plan.py")
    command = [sys.executable, str(script), "--model", "llama2-7b", "--gpu", "h100"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")

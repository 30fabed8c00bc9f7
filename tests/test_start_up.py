"""What a script loads before its arguments are parsed."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = (
    *(
        "train_tokenizer",
        "data_process",
        "pretrain",
        "fine_tuning",
        "quantize",
        "eval",
        "serve",
        "plan",
        "report",
        "doctor",
    ),
    *(
        "convert merge",
        "convert tokens",
        "convert export",
        "convert import",
        "convert data",
        "convert card",
        "quantize ladder",
    ),
)
# Runs a script with its own --help, and tells on stderr whether torch was loaded.
PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("torch" in sys.modules, stop.code or 0, file=sys.stderr)
"""


def probe(script: str, *flags: str) -> subprocess.CompletedProcess:
    name, *command = script.split()
    words = [sys.executable, "-c", PROBE, str(REPOSITORY / f"{name}.py"), *command, *flags]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_wait_for_torch(script):
    done = probe(script, "--help")
    assert done.stderr.split() == ["False", "0"] and "usage:" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistyped_flag_is_refused_before_torch_is_loaded(script):
    done = probe(script, "--no_such_flag", "1")
    assert done.stderr.startswith("False error: --no_such_flag is no flag of")


@pytest.mark.parametrize("script", ["pretrain", "fine_tuning"])
def test_a_backend_that_does_not_exist_is_refused(script):
    done = probe(script, "--train.backend", "megatron")
    expected = "False error: --train.backend expects one of single, ddp, fsdp, deepspeed, found 'megatron'"
    assert done.stderr.startswith(expected)


def test_the_compiler_is_not_loaded_with_the_scripts():
    """torch._dynamo takes more than a second to load, and a chat never needs it."""
    code = "import sys, eval, pretrain, fine_tuning, convert; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# Torch that is not there yet: whoever imports it says so and stops.
NO_TORCH = "import sys\nprint('torch', file=sys.stderr)\nsys.exit(3)\n"


@pytest.mark.parametrize(
    ("flags", "terminal", "lines"),
    [
        ([], True, ["loading out/mine", "torch"]),
        (["--prompt", "江"], True, ["loading out/mine", "torch"]),
        (["--demo", "True"], True, ["loading out/mine", "torch"]),
        (["--task", "loss"], True, ["torch"]),
        (["--input", "q.jsonl"], True, ["torch"]),
        (["--prompt", "江"], False, ["torch"]),
    ],
    ids=str,
)
def test_at_a_terminal_the_first_word_comes_before_torch(tmp_path, environment, flags, terminal, lines):
    (tmp_path / "torch.py").write_text(NO_TORCH)
    here, there = pty.openpty()
    command = [sys.executable, str(REPOSITORY / "eval.py"), "--model", "out/mine", *flags]
    path = f"{tmp_path}:{environment['PYTHONPATH']}"
    ends = {"stdin": there, "stdout": there, "stderr": there if terminal else subprocess.PIPE}
    done = subprocess.run(command, cwd=tmp_path, env=environment | {"PYTHONPATH": path}, **ends)
    os.close(there)
    said = os.read(here, 10_000) if terminal else done.stderr
    os.close(here)
    assert (done.returncode, said.decode().splitlines()) == (3, lines)


def test_ctrl_c_while_torch_is_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(30)\n")
    words = [sys.executable, str(REPOSITORY / "eval.py"), "--model", str(tmp_path), "--prompt", "x"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_a_closed_standard_input_is_an_empty_one(tmp_path: Path) -> None:
    words = f"{sys.executable} {REPOSITORY / 'eval.py'} --model {tmp_path} <&-"
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

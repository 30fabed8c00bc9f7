"""The chat at a terminal (a real one, with Ctrl-C) and over a pipe."""

import io
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from decoding.params import SamplingParams
from serving.terminal import command, converse, print_pieces, with_setting


class Echo:
    """Answers a line with itself, character by character, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.closed, self.resets = [], 0, 0

    def ask(self, line, params):
        self.asked.append((line, params.temperature))
        if line == "too long":
            raise ValueError("the prompt is too long")
        try:
            yield from line
            if line == "stop me":
                raise KeyboardInterrupt
        finally:
            self.closed += 1

    def reset(self):
        self.resets += 1


def talk(monkeypatch, echo, *lines, terminal=False):
    """Run a conversation in which `lines` are typed; KeyboardInterrupt among them is Ctrl-C at the prompt."""
    script = iter([*lines, EOFError])
    prompts = []

    def typed(prompt):
        prompts.append(prompt)
        line = next(script)
        if line in (EOFError, KeyboardInterrupt):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
    return converse(echo.ask, echo.reset, SamplingParams()), prompts


def test_over_a_pipe_only_answers_are_written(monkeypatch, capsys):
    echo = Echo()
    answered, prompts = talk(monkeypatch, echo, "one", "", "  ", "/set temperature 0", "too long", "two", "/reset")
    assert answered == 2 and set(prompts) == {""}
    assert capsys.readouterr() == ("one\ntwo\n", "(temperature is 0.0)\nerror: the prompt is too long\n(forgotten)\n")
    assert echo.asked == [("one", 0.7), ("too long", 0.0), ("two", 0.0)] and echo.resets == 1


def test_quit_ends_it(monkeypatch):
    echo = Echo()
    assert talk(monkeypatch, echo, "one", "/quit", "two")[0] == 1 and echo.asked == [("one", 0.7)]
    for word in ("exit", "quit", "/exit"):
        assert talk(monkeypatch, Echo(), word, "two")[0] == 0


def test_interrupts_on_a_terminal(monkeypatch, capsys):
    echo = Echo()
    ctrl_c = KeyboardInterrupt
    answered, prompts = talk(monkeypatch, echo, "stop me", ctrl_c, "two", ctrl_c, ctrl_c, "never", terminal=True)
    assert capsys.readouterr().out == "stop me [stopped]\n\n(Ctrl-C again leaves)\ntwo\n\n(Ctrl-C again leaves)\n\n"
    assert echo.closed == 2 and [line for line, _ in echo.asked] == ["stop me", "two"] and set(prompts) == {"> "}
    assert answered == 1


def test_interrupts_over_a_pipe_end_it(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        talk(monkeypatch, Echo(), "stop me", "two")
    assert talk(monkeypatch, Echo(), KeyboardInterrupt, "two")[0] == 0


def test_an_answer_is_printed_and_returned(capsys):
    assert print_pieces(iter(["江", "上"])) == "江上"
    assert capsys.readouterr().out == "江上\n"


def test_set_changes_one_field():
    params = SamplingParams()
    assert with_setting(params, ["top_k", "5"]) == SamplingParams(top_k=5)
    assert with_setting(params, ["temperature", "1"]) == SamplingParams(temperature=1.0)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set", "/set expects a name and a value, as in /set temperature 0.7"),
        ("/set temperature 0.7 0.8", "/set expects a name and a value"),
        ("/set temprature 0.7", "unknown setting temprature; did you mean 'temperature'"),
        ("/set top_k 1.5", "top_k should be a whole number, found 1.5"),
        ("/set temperature hot", "temperature should be a number, found hot"),
        ("/set temperature -1", "temperature should be 0 or from 0.01 to 100, found -1.0"),
        ("/rest", "unknown command /rest; did you mean '/reset'"),
    ],
)
def test_commands_that_make_no_sense_are_one_sentence(line, sentence):
    with pytest.raises(ValueError) as error:
        command(line, SamplingParams(), lambda: None)
    assert sentence in str(error.value)


def test_help_names_every_setting(capsys):
    assert command("/help", SamplingParams(), lambda: None) == SamplingParams()
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("temperature 0.7", "seed 0", "/reset", "/quit"))


def read_until(terminal: int, wanted: str, seconds: float = 60) -> str:
    """What appears on a terminal up to and with `wanted`."""
    shown, deadline = b"", time.monotonic() + seconds
    while wanted.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"waited for {wanted!r}, saw {shown.decode(errors='replace')[-500:]!r}"
        shown += os.read(terminal, 1)  # what comes after `wanted` is for the next call
    return shown.decode(errors="replace")


ENDLESS = """
import itertools, time
from decoding.params import SamplingParams
from serving.terminal import converse

def ask(line, params):
    yield line
    for _ in itertools.count():
        time.sleep(0.01)
        yield "."

converse(ask, lambda: None, SamplingParams())
"""


def test_ctrl_c_in_a_real_terminal_stops_the_answer_and_not_the_program():
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(Path(__file__).parents[1])
        os.execv(sys.executable, [sys.executable, "-c", ENDLESS])
    try:
        read_until(terminal, "> ")
        for _ in range(2):
            os.write(terminal, "你好\n".encode())
            read_until(terminal, "\n你好..")  # below what was typed, the answer
            os.write(terminal, b"\x03")
            read_until(terminal, " [stopped]")
            read_until(terminal, "> ")
        time.sleep(0.5)  # readline begins to listen a moment after the prompt has appeared
        os.write(terminal, b"never mind")
        read_until(terminal, "never mind")
        os.write(terminal, b"\x03")
        read_until(terminal, "> ")
        time.sleep(0.5)
        os.write(terminal, b"\x03")
        assert "never" not in read_until(terminal, "(Ctrl-C again leaves)")
        read_until(terminal, "> ")
        time.sleep(0.5)
        os.write(terminal, b"\x03")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)

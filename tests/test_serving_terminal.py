"""The chat at a terminal (a real one, with editing, history, pasted lines and Ctrl-C) and over a pipe."""

import io
import stat
import sys

import pytest
from helpers.terminal import Terminal

from decoding.params import SamplingParams
from serving import typed
from serving.commands import Talk
from serving.terminal import converse, print_pieces


class Echo:
    """Answers a line with itself, character by character, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.closed = [], 0

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


def talk(monkeypatch, echo, *lines, terminal=False):
    """Run a conversation in which `lines` are typed; KeyboardInterrupt among them is Ctrl-C at the prompt."""
    script = iter([*lines, EOFError])

    def following(_=""):
        line = next(script)
        if line in (EOFError, KeyboardInterrupt):
            raise line
        return line

    class Prompt:
        default_buffer = type("", (), {"text": ""})
        prompt = staticmethod(following)

    monkeypatch.setattr("builtins.input", following)
    monkeypatch.setattr(typed, "make_prompt", lambda words: Prompt)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
    return converse(Talk(echo.ask, SamplingParams()))


def test_over_a_pipe_only_answers_are_written(monkeypatch, capsys):
    echo = Echo()
    answered = talk(monkeypatch, echo, "one", "", "  ", "/set temperature 0", "too long", "two", "/reset")
    assert answered == 2
    assert capsys.readouterr() == ("one\ntwo\n", "(temperature is 0.0)\nerror: the prompt is too long\n(forgotten)\n")
    assert echo.asked == [("one", 0.7), ("too long", 0.0), ("two", 0.0)]


def test_quit_ends_it(monkeypatch):
    echo = Echo()
    assert talk(monkeypatch, echo, "one", "/quit", "two") == 1 and echo.asked == [("one", 0.7)]
    for word in ("exit", "quit", "/exit", "/quit now"):
        assert talk(monkeypatch, Echo(), word, "two") == 0


def test_interrupts_on_a_terminal(monkeypatch, capsys):
    echo = Echo()
    ctrl_c = KeyboardInterrupt
    answered = talk(monkeypatch, echo, "stop me", ctrl_c, "two", ctrl_c, ctrl_c, "never", terminal=True)
    assert capsys.readouterr().out == "stop me [stopped]\n(Ctrl-C again leaves)\ntwo\n(Ctrl-C again leaves)\n"
    assert echo.closed == 2 and [line for line, _ in echo.asked] == ["stop me", "two"]
    assert answered == 1


def test_interrupts_over_a_pipe_end_it(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        talk(monkeypatch, Echo(), "stop me", "two")
    assert talk(monkeypatch, Echo(), KeyboardInterrupt, "two") == 0


def test_an_answer_is_printed_and_returned(capsys):
    assert print_pieces(iter(["江", "上"])) == "江上"
    assert capsys.readouterr().out == "江上\n"


def test_history_is_kept_for_its_owner_only(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    typed.open_history().append_string("床前\n明月光")
    assert list(typed.open_history().load_history_strings()) == ["床前\n明月光"]
    path = tmp_path / "little-llama/chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")  # nothing can be written there
    assert list(typed.open_history().load_history_strings()) == []


ECHO = """
import itertools, time
from decoding.params import SamplingParams
from serving.commands import Talk
from serving.terminal import converse

def ask(text, params):
    yield repr(text)
    for _ in itertools.count() if text == "endless" else ():
        time.sleep(0.01)
        yield "."

converse(Talk(ask, SamplingParams()))
"""
LEFT, UP, ALT_ENTER, BACKSPACE, CTRL_C = "\x1b[D", "\x1b[A", "\x1b\r", "\x7f", "\x03"


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with Terminal([sys.executable, "-c", ECHO], columns=40, XDG_STATE_HOME=str(home)) as terminal:
        terminal.wait_for(">")
        yield terminal


def test_chinese_letters_take_two_columns_and_are_edited_one_by_one(terminal):
    terminal.type("床前明月光")
    terminal.wait_for("> 床前明月光")
    assert terminal.cursor == 2 + 2 * 5
    terminal.type(2 * LEFT)
    terminal.wait_for(lambda: terminal.cursor == 2 + 2 * 3)
    terminal.type("x" + 2 * BACKSPACE + "a")
    terminal.wait_for("> 床前a月光")
    assert terminal.cursor == 2 + 2 * 2 + 1
    terminal.type("\r")
    terminal.wait_for_answer("'床前a月光'")


def test_a_line_that_is_longer_than_the_terminal_is_wrapped(terminal):
    terminal.type("月" * 25)  # 19 of them beside the prompt, and 6 below
    terminal.wait_for(lambda: terminal.cursor == 2 + 2 * 6)
    terminal.type(25 * BACKSPACE + "short\r")
    terminal.wait_for_answer("'short'")


def test_earlier_messages_come_back(terminal):
    terminal.type("first one\r")
    terminal.wait_for_answer("'first one'")
    terminal.type(UP + " again\r")
    terminal.wait_for_answer("'first one again'")


def test_pasted_lines_are_one_message(terminal):
    terminal.type("\x1b[200~第一行\r\n  second\n\x1b[201~")
    terminal.wait_for("second")
    terminal.type("\r")
    terminal.wait_for_answer(r"'第一行\n  second'")
    terminal.type("by" + ALT_ENTER + "hand\r")
    terminal.wait_for_answer(r"'by\nhand'")
    terminal.type("/se\t")
    terminal.wait_for("> /set")
    terminal.type(" temperat\t")
    terminal.wait_for("> /set temperature")
    terminal.type(" 0.5\r")
    terminal.wait_for_answer("(temperature is 0.5)")


def test_ctrl_c_stops_an_answer_clears_a_line_and_leaves_at_the_second_time(terminal):
    for _ in range(2):
        terminal.type("endless\r")
        terminal.wait_for("'endless'..")
        terminal.type(CTRL_C)
        terminal.wait_for_answer("[stopped]")
        terminal.type("ready\r")
        terminal.wait_for_answer("'ready'")
        terminal.clear()
    terminal.type("never mind")
    terminal.wait_for("never mind")
    terminal.type(CTRL_C)
    terminal.wait_for(lambda: terminal.cursor == 2)
    terminal.type("mine\r")
    terminal.wait_for_answer("'mine'")
    terminal.type(CTRL_C)
    terminal.wait_for_answer("(Ctrl-C again leaves)")
    terminal.type(CTRL_C)
    assert terminal.status() == 0

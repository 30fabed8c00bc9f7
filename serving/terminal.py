"""A conversation at a terminal or over a pipe: lines in, answers out, and a few commands that begin with a slash."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Generator, Iterable, Iterator

from cli.args import nearest
from cli.progress import say
from decoding.params import SamplingParams
from serving.assistant import Assistant
from serving.session import ChatSession

COMMANDS = ("/set", "/reset", "/help", "/quit")
EXAMPLES = "examples.txt"
LEAVE = ("/quit", "/exit", "quit", "exit")
HELP = """\
/set NAME VALUE   change how answers are drawn; now: {settings}
/reset            forget the conversation
/help             this text
/quit             leave; so do quit, exit, Ctrl-D, and Ctrl-C twice
Ctrl-C stops an answer.{examples}"""

Ask = Callable[[str, SamplingParams], Generator[str, None, None]]


def chat(assistant: Assistant, params: SamplingParams) -> int:
    """Hold a conversation, or continue each line by itself without a chat template; return the number of answers."""
    examples = suggestions(read_examples(assistant))
    if sys.stdin.isatty():
        what = "it continues the text that you type" if assistant.template is None else "ask it something"
        size = assistant.model.n_parameters() / 1e6
        print(f"{assistant.directory}, {size:.2f} M parameters: {what}; /help, /quit{examples}")
    if assistant.template is None:
        return converse(assistant.reply, lambda: None, params)
    session = ChatSession(assistant)
    return converse(session.reply, session.reset, params, examples)


def read_examples(assistant: Assistant) -> list[str]:
    """Return what the data of the model suggest to ask it: `examples.txt` in its directory or in that of its run; []
    where there is none."""
    directory = assistant.directory
    if assistant.template is None or directory is None:
        return []
    path = next((path for path in (directory, directory.parent) if (path / EXAMPLES).is_file()), None)
    return [] if path is None else (path / EXAMPLES).read_text(encoding="utf8").splitlines()


def suggestions(examples: list[str]) -> str:
    """Return lines that suggest what to ask; "" without examples."""
    return "\n  ".join(["\nWhat it has learnt to answer, for example:", *examples]) if examples else ""


def converse(ask: Ask, reset: Callable[[], None], params: SamplingParams, examples: str = "") -> int:
    """Answer each line of standard input with the pieces of text that `ask` yields; return the number of answers.
    examples: lines for /help.

    A ValueError of `ask` is a notice about one line and not the end. Over a pipe, standard output gets nothing but
    answers; notices and errors go to standard error. On a terminal, Ctrl-C stops an answer; over a pipe, the program.
    """
    interactive, answered = sys.stdin.isatty(), 0
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    for line in lines_typed(interactive):
        try:
            if line in LEAVE:
                break
            if line.startswith("/"):
                params = command(line, params, reset, examples)
            else:
                # Close the answer as soon as Ctrl-C stops it, so that its beginning enters the history now.
                with contextlib.closing(ask(line, params)) as pieces:
                    print_pieces(pieces)
                answered += 1
        except ValueError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(" [stopped]", flush=True)
    return answered


def print_pieces(pieces: Iterable[str]) -> str:
    """Print an answer piece by piece, as it comes; return all of it."""
    printed = []
    for piece in pieces:
        printed.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    return "".join(printed)


def lines_typed(interactive: bool) -> Iterator[str]:
    """Yield the lines that are not blank, up to the end of the input or two Ctrl-C in a row on an empty line."""
    typed, interrupted = str, False  # typed(): the line so far; str() is empty, where readline cannot say
    if interactive:
        with contextlib.suppress(ImportError):  # not on Windows; it gives input() line editing and history
            from readline import get_line_buffer as typed
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            print()
            if not interactive or (interrupted and not typed()):
                return
            interrupted = not typed()  # on a line that is not empty, Ctrl-C only clears it
            if interrupted:
                print("(Ctrl-C again leaves)")
            continue
        interrupted = False
        if line:
            yield line


def command(line: str, params: SamplingParams, reset: Callable[[], None], examples: str = "") -> SamplingParams:
    """Carry out a line that begins with a slash; return the settings from here on. Raises ValueError for an unknown
    command or setting."""
    name, *words = line.split()
    if name == "/reset":
        reset()
        say("(forgotten)")
    elif name == "/help":
        settings = ", ".join(f"{key} {value}" for key, value in vars(params).items())
        say(HELP.format(settings=settings, examples=examples))
    elif name == "/set":
        params = with_setting(params, words)
        say(f"({words[0]} is {getattr(params, words[0])})")
    else:
        raise ValueError(f"unknown command {name}{nearest(name, COMMANDS)}; commands are {', '.join(COMMANDS)}")
    return params


def with_setting(params: SamplingParams, words: list[str]) -> SamplingParams:
    """Return `params` with one field changed; words: its name and its value."""
    kinds = {f.name: type(f.default) for f in dataclasses.fields(params)}
    if len(words) != 2:
        raise ValueError(f"/set expects a name and a value, as in /set temperature 0.7; names are {', '.join(kinds)}")
    name, value = words
    if name not in kinds:
        raise ValueError(f"unknown setting {name}{nearest(name, kinds)}; settings are {', '.join(kinds)}")
    try:
        number = kinds[name](value)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[kinds[name]]
        raise ValueError(f"{name} should be {kind}, found {value}") from None
    return dataclasses.replace(params, **{name: number})

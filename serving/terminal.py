"""A conversation at a terminal, or over a pipe: lines in, answers out, and a few commands that begin with a slash."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Generator, Iterable, Iterator

from cli.args import nearest
from cli.progress import tell
from decoding.params import SamplingParams

COMMANDS = ("/set", "/reset", "/help", "/quit")
HELP = """\
/set NAME VALUE   change how answers are drawn; now: {settings}
/reset            forget the conversation
/help             this text
/quit             leave; so do Ctrl-D, and Ctrl-C twice
Ctrl-C stops an answer."""

Ask = Callable[[str, SamplingParams], Generator[str, None, None]]


def converse(ask: Ask, reset: Callable[[], None], params: SamplingParams) -> int:
    """Answer lines of standard input by the pieces of text that `ask` gives, until it ends; returns how many.

    A ValueError of `ask` is the answer to one line and not the end. Standard output gets nothing but answers over a
    pipe; notices and errors go to standard error. On a terminal Ctrl-C stops an answer; over a pipe it ends it all.
    """
    interactive, answered = sys.stdin.isatty(), 0
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    for line in lines_typed(interactive):
        try:
            if line == "/quit":
                break
            if line.startswith("/"):
                params = command(line, params, reset)
            else:
                # Closed at once when Ctrl-C stops it, so that what was said enters the history now.
                with contextlib.closing(ask(line, params)) as pieces:
                    say(pieces)
                answered += 1
        except ValueError as error:
            tell(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(" [stopped]", flush=True)
    return answered


def say(pieces: Iterable[str]) -> str:
    """Print an answer as it comes; returns what was said."""
    said = []
    for piece in pieces:
        said.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    return "".join(said)


def lines_typed(interactive: bool) -> Iterator[str]:
    """Lines with something on them, up to the end of the input or two Ctrl-C in a row on an empty one."""
    typed, interrupted = str, False  # what stands on the line, if one can tell: str() is empty
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
            interrupted = not typed()  # with something on the line, Ctrl-C just clears it
            if interrupted:
                print("(Ctrl-C again leaves)")
            continue
        interrupted = False
        if line:
            yield line


def command(line: str, params: SamplingParams, reset: Callable[[], None]) -> SamplingParams:
    """Carry out a line that begins with a slash; returns the settings from here on. ValueError if it makes no sense."""
    name, *words = line.split()
    if name == "/reset":
        reset()
        tell("(forgotten)")
    elif name == "/help":
        tell(HELP.format(settings=", ".join(f"{key} {value}" for key, value in vars(params).items())))
    elif name == "/set":
        params = with_setting(params, words)
        tell(f"({words[0]} is {getattr(params, words[0])})")
    else:
        raise ValueError(f"unknown command {name}{nearest(name, COMMANDS)}; commands are {', '.join(COMMANDS)}")
    return params


def with_setting(params: SamplingParams, words: list[str]) -> SamplingParams:
    """`params` with one field changed: words are its name and its value."""
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

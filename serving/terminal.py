"""A conversation at a terminal or over a pipe: lines in, answers out, and a few commands that begin with a slash."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator

from cli.progress import say
from decoding.params import SamplingParams
from serving.assistant import Assistant
from serving.commands import LEAVE, Talk, carry_out, is_command, words_of_commands
from serving.session import ChatSession

EXAMPLES = "examples.txt"


def chat(assistant: Assistant, params: SamplingParams) -> int:
    """Hold a conversation, or continue each line by itself without a chat template; return the number of answers."""
    examples = suggestions(read_examples(assistant))
    if sys.stdin.isatty():
        what = "it continues the text that you type" if assistant.template is None else "ask it something"
        size = assistant.model.n_parameters() / 1e6
        print(f"{assistant.directory}, {size:.2f} M parameters: {what}; /help, /quit{examples}")
    if assistant.template is None:
        return converse(Talk(assistant.reply, params))
    session = ChatSession(assistant)
    return converse(Talk(session.reply, params, session, examples))


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


def converse(talk: Talk) -> int:
    """Answer each message that is typed, or each line of standard input; return the number of answers.

    A ValueError is a notice about one message and not the end. Over a pipe, standard output gets nothing but answers;
    notices and errors go to standard error. On a terminal, Ctrl-C stops an answer; over a pipe, the program.
    """
    interactive, answered = sys.stdin.isatty(), 0
    for text in typed_messages() if interactive else lines_given():
        try:
            if text in LEAVE or text.startswith(("/quit ", "/exit ")):
                break
            pieces = carry_out(text, talk) if is_command(text) else talk.ask(text, talk.params)
            if pieces is not None:
                # Close the answer as soon as Ctrl-C stops it, so that its beginning enters the history now.
                with contextlib.closing(pieces):
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


def typed_messages() -> Iterator[str]:
    """Return an iterator over the messages that a person types at the terminal."""
    from serving import typed  # not for a pipe

    return typed.typed_messages(words_of_commands())


def lines_given() -> Iterator[str]:
    """Yield the lines of standard input that are not blank, up to its end or Ctrl-C."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if line:
            yield line

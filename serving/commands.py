"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chat.conversations import file_conversations
from cli.args import nearest
from cli.progress import say
from corpora.registry import BadRecord
from decoding.params import SamplingParams
from files import write_json_lines
from serving.session import ChatSession

LEAVE = ("/quit", "/exit", "quit", "exit")
Ask = Callable[[str, SamplingParams], Generator[str, None, None]]
Pieces = Generator[str, None, None]


@dataclass
class Talk:
    """What is talked about, with whom, and how answers are drawn."""

    ask: Ask
    """answers a question or continues a text, piece by piece"""
    params: SamplingParams
    session: ChatSession | None = None
    """the conversation; None: every text stands for itself"""
    examples: str = ""
    """lines for /help: what the model has learnt to answer"""
    file: Path | None = None
    """where the conversation was saved or read last; that file may be replaced"""

    def conversation(self, name: str) -> ChatSession:
        """Return the conversation that a command is about. Raises ValueError where there is none."""
        if self.session is None:
            raise ValueError(f"{name} needs a conversation, and this model continues texts without a chat template")
        return self.session


def is_command(text: str) -> bool:
    """Return whether a message is a command: one line with a slash, or several that begin with a command's name."""
    return text.startswith("/") and ("\n" not in text or text.split()[0] in COMMANDS)


def carry_out(line: str, talk: Talk) -> Pieces | None:
    """Carry out a command; return the pieces of an answer where it has one. Raises ValueError for one that is unknown
    or makes no sense."""
    name, *rest = line.split(maxsplit=1)
    if name not in COMMANDS:
        names = [*COMMANDS, "/quit"]
        raise ValueError(f"unknown command {name}{nearest(name, names)}; commands are {', '.join(names)}")
    return COMMANDS[name].function(talk, *rest or [""])


def set_sampling(talk: Talk, rest: str) -> None:
    words = rest.split()
    talk.params = with_setting(talk.params, words)
    say(f"({words[0]} is {getattr(talk.params, words[0])})")


def set_system(talk: Talk, text: str) -> None:
    session = talk.conversation("/system")
    if text:
        session.set_system("" if text == "-" else text)
    now = session.assistant.system
    say(f"(the system message is: {now})" if now else "(there is no system message)")


def retry(talk: Talk, _: str) -> Pieces:
    return talk.conversation("/retry").retry(talk.params)


def save(talk: Talk, name: str) -> None:
    session, path = talk.conversation("/save"), path_of("/save", name)
    if not session.messages:
        raise ValueError("/save: there is no conversation yet")
    if path.exists() and (talk.file is None or path.resolve() != talk.file.resolve()):
        raise ValueError(f"/save {path}: the file is there already; choose another name")
    try:
        write_json_lines(path, [{"messages": session.all_messages()}])
    except OSError as error:
        raise ValueError(f"/save {path}: it could not be written ({error.strerror})") from None
    talk.file = path
    say(f"({len(session.messages)} messages in {path})")


def load(talk: Talk, name: str) -> None:
    session, path = talk.conversation("/load"), path_of("/load", name)
    if not path.is_file():
        raise ValueError(f"/load {path}: there is no such file")
    broken: list[BadRecord] = []
    found = list(file_conversations(path, broken))
    if len(found) != 1 or broken:
        raise ValueError(
            f"/load {path}: expected one conversation, as /save writes it, found {len(found) + len(broken)}"
        )
    session.restore(found[0])
    talk.file = path
    say(f"({len(session.messages)} messages from {path})")


def reset(talk: Talk, _: str) -> None:
    if talk.session is not None:
        talk.session.reset()
    talk.file = None
    say("(forgotten)")


def tell_commands(talk: Talk, _: str) -> None:
    values = {"settings": ", ".join(f"{key} {value}" for key, value in vars(talk.params).items())}
    values["system"] = (talk.session and talk.session.assistant.system) or "nothing"
    lines = [f"{name} {each.argument}".ljust(18) + each.help.format(**values) for name, each in COMMANDS.items()]
    say("\n".join([*lines, KEYS + talk.examples]))


class Command(NamedTuple):
    """What stands after the name of a command, what it does, and the function that does it."""

    argument: str
    help: str
    function: Callable[[Talk, str], Pieces | None]


COMMANDS = {
    "/set": Command("NAME VALUE", "change how answers are drawn; now: {settings}", set_sampling),
    "/system": Command("TEXT", "what stands before the conversation, - for nothing; now: {system}", set_system),
    "/retry": Command("", "answer the last question again", retry),
    "/save": Command(
        "FILE", "write the conversation to a file, for /load, the page of serve.py and fine_tuning.py", save
    ),
    "/load": Command("FILE", "go on with a conversation from a file", load),
    "/reset": Command("", "forget the conversation", reset),
    "/help": Command("", "this text", tell_commands),
}
KEYS = """\
/quit             leave; so do quit, exit, Ctrl-D, and Ctrl-C twice
Ctrl-C stops an answer. Lines that are pasted are one message; Alt-Enter begins a new line."""


def words_of_commands() -> dict[str, list[str]]:
    """Return the commands and, for each, the words that may come after it."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    return {name: names if name == "/set" else [] for name in (*COMMANDS, "/quit")}


def path_of(command: str, name: str) -> Path:
    """Return the file that a command names. Raises ValueError where it names none."""
    if not name:
        raise ValueError(f"{command} expects the name of a file, as in {command} talk.jsonl")
    with contextlib.suppress(RuntimeError):  # there is no such user
        return Path(name).expanduser()
    return Path(name)


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

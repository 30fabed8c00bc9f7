"""What a person types at a terminal: lines with editing, history and completion (prompt_toolkit)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import create_output


def typed_messages(words: dict[str, Iterable[str]]) -> Iterator[str]:
    """Yield what is typed, without blank messages, up to Ctrl-D or two Ctrl-C in a row on an empty line.

    What is pasted is part of one message, with all its lines. words: what Tab completes, and what may come after each.
    """
    session, interrupted = make_prompt(words), False
    while True:
        try:
            message = session.prompt("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            empty = not session.default_buffer.text
            if interrupted and empty:
                return
            interrupted = empty  # on a line that is not empty, Ctrl-C only clears it
            if interrupted:
                print("(Ctrl-C again leaves)")
            continue
        interrupted = False
        if message:
            yield message


def make_prompt(words: dict[str, Iterable[str]]) -> PromptSession:
    """Return a prompt that completes `words`, keeps its history, and begins a new line at Alt-Enter."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=open_history(),
        key_bindings=keys,
        completer=CommandCompleter(words),
        complete_while_typing=False,
        prompt_continuation="  ",
        output=create_output(always_prefer_tty=True),  # answers may go to a file
    )


class CommandCompleter(Completer):
    """Completes the first word of a line that begins with a slash, and the word after it."""

    def __init__(self, words: dict[str, Iterable[str]]) -> None:
        self.words = words

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor.split(" ")
        if not before[0].startswith("/") or len(before) > 2:
            return
        for word in self.words if len(before) == 1 else self.words.get(before[0], ()):
            if word.startswith(before[-1]):
                yield Completion(word, start_position=-len(before[-1]))


def open_history() -> History:
    """Return the lines typed in earlier chats, in ~/.local/state/little-llama (XDG_STATE_HOME); where nothing can be
    written, those of this chat."""
    try:
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "little-llama"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = home / "chat_history"
        path.touch(mode=0o600)
        path.open("ab").close()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return InMemoryHistory()
    return FileHistory(path)

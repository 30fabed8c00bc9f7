"""From the messages of a conversation to the text that a chat template makes of them, as in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jinja2

from chat.answers import CLOSE, OPEN
from chat.jinja import BEGIN, BREAK, ENVIRONMENT, FINISH
from chat.messages import Message
from tokenizer import Tokenizer

BLOCK = re.compile(f"{BEGIN}([^{FINISH}]*){FINISH}")  # what a {% generation %} block writes


def any_of(names: Iterable[str]) -> str:
    """Return a regular expression that matches one of the names, the longest first; without names it never matches."""
    return f"(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True))) or '(?!)'})"


class Renderer:
    """A compiled template, and the special tokens of the vocabulary that it writes for.

    names: matches the empty text before a special token
    tokens: matches marks, and special tokens but those after BREAK, which are text
    places: the same, and the tokens of the vocabulary that are not special
    in_answers: special tokens that an answer may contain, beside <think> and </think>
    has_blocks: the template has {% generation %} blocks

    Raises ValueError when the Jinja cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer, jinja: str, name: str, in_answers: Iterable[str] = ()) -> None:
        self.name, self.variables = name, tokenizer.special_names()
        names = any_of(tokenizer.special)
        self.names = re.compile(f"(?={names})")
        # Templates look for these two in an answer, so there they stay what they are.
        self._names_in_answers = re.compile(f"(?={any_of(set(tokenizer.special) - {OPEN, CLOSE, *in_answers})})")
        self.tokens = re.compile(f"([{BREAK}{BEGIN}{FINISH}]|(?<!{BREAK}){names})")
        self.places = re.compile(f"{self.tokens.pattern}|{any_of(tokenizer.added)}")
        try:
            self._template = ENVIRONMENT.from_string(jinja)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"{name} is not a valid Jinja template: {error}") from None
        self.has_blocks = re.search(r"\{%[-+]?\s*generation\b", jinja) is not None

    def as_text(self, message: Message) -> Message:
        """Return a message with BREAK before special tokens in all its texts."""
        names = self._names_in_answers if message["role"] == "assistant" else self.names

        def mark(value: Any) -> Any:
            if isinstance(value, str):
                return names.sub(BREAK, value)
            if isinstance(value, dict):
                return {mark(key): mark(each) for key, each in value.items()}
            return [mark(each) for each in value] if isinstance(value, list) else value

        return {key: value if key == "role" else mark(value) for key, value in message.items()}

    def fill(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Return the template's text of messages of `as_text`, BEGIN and FINISH around {% generation %} blocks.

        The variables are those that transformers passes. Raises ValueError when the template refuses the messages.
        """
        tools = next((message["tools"] for message in messages if message.get("tools")), None)
        given = [{key: value for key, value in each.items() if key not in ("tools", "loss")} for each in messages]
        for message in given:
            if "reasoning_content" in message:
                message["thinking"] = message["reasoning_content"]  # the name that gpt-oss reads
        try:
            return ENVIRONMENT.fill(
                self._template,
                messages=given,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except ValueError as error:
            raise ValueError(f"{self.name} refuses this conversation: {error}") from None

    def fill_plain(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Return what `fill` does, without the marks of blocks."""
        return BLOCK.sub(r"\1", self.fill(messages, add_generation_prompt))

    def tokens_in(self, text: str, place: str = "") -> list[str]:
        """Return the special tokens in `text` after the last `place`; none where there is no such place."""
        start = text.rfind(place) if place else 0
        return [match[0] for match in self.tokens.finditer(text, start)] if start >= 0 else []

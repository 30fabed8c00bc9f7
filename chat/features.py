"""Which parts of a conversation a chat template renders, found by rendering a word in each place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from chat.messages import OPTIONAL, Message

WORD = "Zq7Kx3Wv9"  # nine letters and digits, because Mistral's template wants ids of calls in this form


def rendered_parts(render: Callable[[list[Message], bool], str]) -> set[str]:
    """Return which keys of OPTIONAL, and which of the roles "system" and "tool", a template renders.

    render: messages, add_generation_prompt -> text; ValueError where the template refuses them
    """
    return {part for part in (*OPTIONAL, "system", "tool") if any(_shows(render, each) for each in probes(part))}


def _shows(render: Callable[[list[Message], bool], str], messages: list[Message]) -> bool:
    try:
        return WORD in render(messages, messages[-1]["role"] in ("user", "tool"))
    except ValueError:
        return False


def probes(part: str) -> Iterator[list[Message]]:
    """Yield conversations in which WORD is the value of `part`, a key or a role."""
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    if part == "system":
        yield [{"role": "system", "content": WORD}, question, answer]
    elif part == "tools":
        yield [question | {"tools": [{"type": "function", "function": _function(WORD)}]}]
    elif part == "reasoning_content":
        yield [question, answer | {"reasoning_content": WORD}]
    for content in ({"content": ""}, {}):  # templates differ in what they expect of a message that only calls
        if part == "tool_calls":
            yield [question, calling(WORD, **content)]
        elif part in ("tool", "name", "tool_call_id"):
            result = {"role": "tool", "content": "r", "name": "f", "tool_call_id": WORD[::-1]}
            yield [question, calling("f", **content), result | {"content" if part == "tool" else part: WORD}]


def calling(name: str, **content: str) -> Message:
    """Return a message that calls the function `name` without arguments."""
    call = {"type": "function", "id": WORD[::-1], "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", **content, "tool_calls": [call]}


def _function(name: str) -> dict[str, Any]:
    return {"name": name, "description": "d", "parameters": {"type": "object", "properties": {}, "required": []}}

"""Which parts of a conversation a chat template renders, found by rendering a word in each place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from chat.messages import OPTIONAL, Message

WORD = "Zq7Kx3Wv9"  # nine letters and digits, because Mistral's template wants ids of calls in this form
ROLES = {"system": "role system", "tool": "role tool"}
BESIDE = "content beside tool_calls"
WORDS = {"role system": "a system message", "role tool": "results of tools", BESIDE: "text beside `tool_calls`"}
PARTS = (*OPTIONAL, *ROLES.values(), BESIDE)


def parts_of(messages: list[Message]) -> list[str]:
    """Return which of PARTS a conversation has."""
    parts = {key for message in messages for key in OPTIONAL if message.get(key)}
    parts |= {ROLES[message["role"]] for message in messages if message["role"] in ROLES}
    parts |= {BESIDE for message in messages if message.get("tool_calls") and message.get("content", "").strip()}
    return [part for part in PARTS if part in parts]


def rendered_parts(render: Callable[[list[Message], bool], str]) -> set[str]:
    """Return which of PARTS a template renders.

    render: messages, add_generation_prompt -> text; ValueError where the template refuses them
    """
    return {part for part in PARTS if any(_shows(render, each) for each in probes(part))}


def _shows(render: Callable[[list[Message], bool], str], messages: list[Message]) -> bool:
    try:
        return WORD in render(messages, messages[-1]["role"] in ("user", "tool"))
    except ValueError:
        return False


def probes(part: str) -> Iterator[list[Message]]:
    """Yield conversations in which WORD is the value of `part`."""
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    if part == ROLES["system"]:
        yield [{"role": "system", "content": WORD}, question, answer]
    elif part == "tools":
        yield [question | {"tools": [{"type": "function", "function": _function(WORD)}]}]
    elif part == "reasoning_content":
        yield [question, answer | {"reasoning_content": WORD}]
    elif part == BESIDE:
        yield [question, calling("f", content=WORD)]
    for content in ({"content": ""}, {}):  # templates differ in what they expect of a message that only calls
        if part == "tool_calls":
            yield [question, calling(WORD, **content)]
        elif part in (ROLES["tool"], "name", "tool_call_id"):
            result = {"role": "tool", "content": "r", "name": "f", "tool_call_id": WORD[::-1]}
            key = "content" if part == ROLES["tool"] else part
            yield [question, calling("f", **content), result | {key: WORD}]


def calling(name: str, **content: str) -> Message:
    """Return a message that calls the function `name` without arguments."""
    call = {"type": "function", "id": WORD[::-1], "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", **content, "tool_calls": [call]}


def _function(name: str) -> dict[str, Any]:
    return {"name": name, "description": "d", "parameters": {"type": "object", "properties": {}, "required": []}}

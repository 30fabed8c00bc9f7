"""Calls of tools in an answer: found in the text that chat templates teach, for OpenAI's API.

Three forms are known: `<tool_call>{"name": ..., "arguments": ...}</tool_call>` (ours, ChatML, Qwen, Hermes), a list
after `[TOOL_CALLS]` (Mistral), and an answer that is one object (Llama 3.2, with `parameters` for `arguments`).
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from tokenizer import Tokenizer

OPEN, CLOSE, LIST = "<tool_call>", "</tool_call>", "[TOOL_CALLS]"
MARKS = (OPEN, LIST)
CALL = re.compile(rf"\s*{OPEN}(.*?)(?:{CLOSE}|$)\s*", re.DOTALL)
Call = dict[str, Any]


def split_calls(text: str) -> tuple[str, list[Call]]:
    """Return the text of an answer without its calls, and the calls in OpenAI's form; what is no call stays text."""
    if LIST in text:
        before, _, after = text.partition(LIST)
        calls = read_calls(after)
        return (before.rstrip(), calls) if calls else (text, [])
    if OPEN not in text:
        calls = read_calls(text) if text.lstrip().startswith("{") else []
        return ("", calls) if calls else (text, [])
    found = [read_calls(match[1]) for match in CALL.finditer(text)]
    if not all(found):  # half a call, or none at all: the reader shall see what the model wrote
        return text, []
    return CALL.sub("", text), [call for calls in found for call in calls]


def read_calls(text: str) -> list[Call]:
    """Return the calls in a JSON object or a list of them; [] where it is anything else."""
    try:
        values, _ = json.JSONDecoder().raw_decode(text.strip())
    except (ValueError, RecursionError):
        return []
    values = values if isinstance(values, list) else [values]
    calls = [as_call(value) for value in values]
    return [call for call in calls if call] if all(calls) else []


def as_call(value: Any) -> Call | None:
    """Return one call in OpenAI's form, whose arguments are a text; None where `value` is no call."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    function = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def marks_in(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Return the ids of marks that are special tokens of a vocabulary, with their names."""
    return {i: name.encode() for name, i in tokenizer.special.items() if name in (OPEN, CLOSE, LIST)}


def certain(text: str) -> int:
    """Return how many characters of an answer so far belong to no call, whatever follows."""
    if text.lstrip().startswith("{"):
        return 0
    at = min((place for mark in MARKS if (place := text.find(mark)) >= 0), default=None)
    if at is None:
        longest = min(len(text), max(map(len, MARKS)) - 1)
        half = (n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in MARKS))
        at = len(text) - next(half, 0)
    return len(text[:at].rstrip())  # the white space before a call is not told

"""Turns of the usual forms -> messages, as `chat/messages.py` describes them; and what of a record is not used.

Read are `role` or `from`; `content`, `value`, `text` or `message`, also as a list of parts; thoughts, calls, results of
tools and `tools`; and whether an answer is trained. Two forms have no roles: turns with `human` and `assistant`, and
KdConv's turns with `message`, which alternate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from chat.messages import Message
from corpora.streams import printable

ROLES = {"human": "user", "prompter": "user", "developer": "system"}  # other names -> our names
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "function_call"), "assistant")
ROLES |= dict.fromkeys(("observation", "function", "ipython"), "tool")
WHO = ("role", "from")
CONTENT = ("content", "value", "text", "message")
THOUGHT = ("reasoning_content", "thinking")
TOOLS = ("tools", "functions")
LOSS = ("loss", "weight", "loss_weight", "train")
PAIR = ("human", "assistant")


class Fields(dict):
    """An object of a file, which remembers the keys that were read, and what of it is left out.

    read: keys that were read with [] or `get`; `in` and `has` do not count
    left_out: phrases such as "`title`, which is not used"
    """

    def __init__(self, values: dict, left_out: set[str] | None = None) -> None:
        super().__init__(values)
        self.read: set[str] = set()
        self.left_out: set[str] = set() if left_out is None else left_out

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def has(self, key: str) -> bool:
        """Return whether there is more than nothing under a key; null and empty values are nothing."""
        value = super().get(key)
        return value is not None and value not in ("", [], {})

    def first(self, keys: Iterable[str]) -> Any:
        """Return the first value that is more than nothing; else the first value that is there, or None."""
        keys = [key for key in keys if key in self]
        key = next(filter(self.has, keys), keys[0] if keys else None)
        return None if key is None else self[key]

    def unread(self) -> list[str]:
        """Return the keys that were not read although they hold something."""
        return [key for key in self if key not in self.read and self.has(key)]


def read_turns(turns: list, left_out: set[str]) -> list[Message]:
    """Return the messages of a list of turns, without an empty system message at the beginning.

    Add to `left_out` what of the turns is not used. Raises ValueError for turns of no known form.
    """
    messages = []
    for n, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"a turn should be an object with 'role' and 'content', found {type(turn).__name__}")
        fields = Fields(turn)
        if not any(key in turn for key in WHO) and all(key in turn for key in PAIR):
            messages += [{"role": role, "content": fields[key]} for role, key in zip(("user", "assistant"), PAIR)]
        else:
            messages.append(_message(fields, ("user", "assistant")[n % 2]))
        left_out |= fields.left_out | {printable(f"turns with `{key}`, which is not used") for key in fields.unread()}
    tools = [message.pop("tools") for message in messages if "tools" in message]
    if messages and messages[0]["role"] == "system" and not str(messages[0]["content"] or "").strip():
        messages = messages[1:]
    return with_tools(messages, tools)


def with_tools(messages: list[Message], several: list[list]) -> list[Message]:
    """Return the messages with `tools` in the first one; ValueError where a record has different ones in places."""
    several = [*several, *(message["tools"] for message in messages[:1] if "tools" in message)]
    if any(tools != several[0] for tools in several):
        raise ValueError("the record has different tools in several places: put them into one")
    return [messages[0] | {"tools": several[0]}, *messages[1:]] if several and messages else messages


def read_tools(fields: Fields) -> list[list]:
    """Return [] or [the tools of a record or turn]: a list of JSON schemas, or JSON text of such a list."""
    if not any(fields.has(key) for key in TOOLS):
        return []
    tools = _from_json(fields.first(TOOLS), "tools")
    tools = tools if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools should be a list of JSON schemas, or its JSON text, found {tools!r:.100}")
    return [[_function(tool) for tool in tools]] if tools else []


def _message(turn: Fields, alternating: str) -> Message:
    """Return the message of a turn; `alternating` is the role of one of KdConv's."""
    name = str(turn.first(WHO)) if any(key in turn for key in WHO) or "message" not in turn else alternating
    role = ROLES.get(name.lower(), name.lower())
    message: Message = {"role": role, "content": turn.first(CONTENT)}
    if is_parts(message["content"]):
        message |= _read_parts(message["content"], turn.left_out)
    elif role == "tool" and not isinstance(message["content"], str):
        message["content"] = as_text(message["content"])
    if role == "assistant":
        _read_answer(turn, message, called=name.lower() == "function_call")
    message |= {key: turn[key] for key in ("name", "tool_call_id") if turn.has(key)}
    if tools := read_tools(turn):
        message["tools"] = tools[0]
    losses = [turn[key] for key in LOSS if key in turn and turn[key] is not None]
    for loss in losses:
        if loss not in (0, 1):
            raise ValueError(f"the loss (or weight) of a turn should be true, false, 1 or 0, found {loss!r}")
    return message | {"loss": False} if role == "assistant" and not all(losses) else message


def _read_answer(turn: Fields, message: Message, called: bool) -> None:
    """Add the thought and the calls of an answer; `called`: its content is nothing but JSON of calls, or ends so."""
    if any(map(turn.has, THOUGHT)):
        message["reasoning_content"] = turn.first(THOUGHT)
    calls = message.pop("tool_calls", [])
    for key in ("tool_calls", "function_call"):
        if turn.has(key):
            calls += _calls(turn[key])
    if called:
        thought, end, call = str(message["content"]).rpartition("</think>")
        calls += _calls(call)
        message["content"] = thought + end
    if calls:
        message["content"] = "" if message["content"] is None else message["content"]
        message["tool_calls"] = calls


def is_parts(content: Any) -> bool:
    """Return whether the content of a turn is a list of parts, each of them with its type or a text."""
    return isinstance(content, list) and all(isinstance(p, dict) and ("type" in p or "text" in p) for p in content)


def _read_parts(parts: list[dict], left_out: set[str]) -> Message:
    """Return content, thought and calls of a list of parts. Raises ValueError for images, sound and the like."""
    texts: dict[str, list[str]] = {"text": [], "reasoning": []}
    message: Message = {}
    for each in parts:
        part = Fields(each)
        name = part.get("type") or "text"
        kind = "reasoning" if name == "thinking" else name
        value = part.first(("value", name, "text"))
        if kind == "tool_call":
            message.setdefault("tool_calls", []).extend(_calls(value))
        elif kind not in texts:
            raise ValueError(f"a turn has a part of type {kind!r}: only text is trained; leave such records out")
        elif not isinstance(value, str):
            raise ValueError(f"a part of type {kind!r} should have a text, found {value!r:.100}")
        else:
            texts[kind].append(value)
        left_out |= {printable(f"parts with `{key}`, which is not used") for key in part.unread()}
    message["content"] = "".join(texts["text"])
    return message | ({"reasoning_content": "".join(texts["reasoning"])} if texts["reasoning"] else {})


def _calls(value: Any) -> list[dict]:
    """Return calls in OpenAI's form from a list of them or one, each also as {"name", "arguments"}, or from JSON."""
    calls = _from_json(value, "a call")
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not ("function" in call or isinstance(call.get("name"), str)):
            raise ValueError(f'a call should be an object with "name" and "arguments", found {call!r:.100}')
    return [_function(call) for call in calls]


def _function(value: dict) -> dict:
    """Return a tool or a call in OpenAI's form, {"type": "function", "function": {...}}."""
    return value if "function" in value else {"type": "function", "function": value}


def _from_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} should be an object, a list, or the JSON text of one: {error}") from None


def as_text(value: Any) -> str:
    """Return a text unchanged, nothing as "", and any other value of a record as its JSON."""
    if value is None or value in ([], {}):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

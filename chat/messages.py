"""Messages of a conversation, and the order of their roles.

A message is a dict:

    role               "system", "user", "assistant" or "tool" (the result of a call)
    content            str; an assistant message with calls may be without it
    reasoning_content  str, optional: what the assistant thinks before its answer
    tool_calls         list, optional: what the assistant calls,
                       {"type": "function", "id": str (optional), "function": {"name": str, "arguments": dict or str}}
    name, tool_call_id str, optional: the function, or the call, that a tool message answers
    tools              list, optional, in the first message: the functions that the assistant may call, as JSON schemas
                       (OpenAI's form); a chat template gets them beside the messages
    loss               False: this answer is not trained

A key that a record lacks, or has as null, is absent. A text without roles is one message of role "text".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]

OPTIONAL = ("reasoning_content", "tool_calls", "name", "tool_call_id", "tools")  # what templates may render or not
AFTER = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


def check_messages(messages: list[Message], add_generation_prompt: bool = False) -> None:
    """Raise ValueError unless user and assistant alternate, beginning with user, after at most one system message.

    Between an answer and the next one there may be tool messages instead of the user's. add_generation_prompt: the last
    message has to be of the user or a tool, because the assistant is about to answer it.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    expected = ("system", "user")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content", ""), str):
            raise ValueError(f"message {n} should have a role and a string as content, found {message!r:.200}")
        role = message.get("role")
        if role not in expected:
            raise ValueError(f"message {n} should be of role {' or '.join(expected)}, found {role!r}")
        if "content" not in message and not (role == "assistant" and message.get("tool_calls")):
            raise ValueError(f"message {n} should have a role and a string as content, found {message!r:.200}")
        _check_optional(n, message)
        expected = AFTER[role]
    if add_generation_prompt and "assistant" not in expected:
        raise ValueError(
            f"the last message should be of role 'user' or 'tool' for the assistant to answer, found {role!r}"
        )


def _check_optional(n: int, message: Message) -> None:
    """Raise ValueError when a key of OPTIONAL has a value of another kind than the head of this file says."""
    for key in ("reasoning_content", "name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise ValueError(f"message {n}: {key} should be a string, found {message[key]!r:.100}")
    if not isinstance(tools := message.get("tools", []), list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"message {n}: tools should be a list of JSON schemas, found {tools!r:.100}")
    if not isinstance(calls := message.get("tool_calls", []), list):
        raise ValueError(f"message {n}: tool_calls should be a list, found {calls!r:.100}")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'message {n}: a tool call should have a "function" with a name, found {call!r:.100}')
        if not isinstance(function.get("arguments", ""), dict | str):
            raise ValueError(f"message {n}: arguments should be an object or its JSON, found {call!r:.100}")


def texts(value: Any) -> Iterator[str]:
    """Yield every text in a message, or in a value of it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.items() if isinstance(value, dict) else value:
            yield from texts(list(each) if isinstance(each, tuple) else each)

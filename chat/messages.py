"""Messages of a conversation, and the order in which roles may stand."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": str}, "loss": False if it is no target


ROLES = ("system", "user", "assistant")


def check_messages(messages: list[Message], add_generation_prompt: bool = False) -> None:
    """Raise ValueError unless roles are known, system stands first if at all, and user and assistant take turns."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    expected = ("system", "user")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {n} should have a role and a content that is a string, found {message!r:.200}")
        role = message.get("role")
        if role not in expected:
            raise ValueError(f"message {n} should be of role {' or '.join(expected)}, found {role!r}")
        expected = ("assistant",) if role == "user" else ("user",)
    if add_generation_prompt and expected != ("assistant",):
        raise ValueError(f"the assistant can answer only a user message, and the last is of role {role!r}")

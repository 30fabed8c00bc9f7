"""Messages of a conversation, and the order of their roles."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": str}; "loss": False: not trained

ROLES = ("system", "user", "assistant")


def check_messages(messages: list[Message], add_generation_prompt: bool = False) -> None:
    """Raise ValueError unless user and assistant alternate, beginning with user, after at most one system message.

    add_generation_prompt: the last message has to be the user's, because the assistant is about to answer it.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    expected = ("system", "user")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {n} should have a role and a string as content, found {message!r:.200}")
        role = message.get("role")
        if role not in expected:
            raise ValueError(f"message {n} should be of role {' or '.join(expected)}, found {role!r}")
        expected = ("assistant",) if role == "user" else ("user",)
    if add_generation_prompt and expected != ("assistant",):
        raise ValueError(f"the last message should be of role 'user' for the assistant to answer, found {role!r}")

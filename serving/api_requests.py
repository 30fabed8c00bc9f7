"""What clients may ask for: the bodies of OpenAI's API as models that check them, and errors that tell what is wrong.

Unknown fields are ignored, as OpenAI does; a field of a wrong type is an error that names it. `top_k`, `min_p`,
`repetition_penalty`, `ignore_eos` and `add_special_tokens` are not OpenAI's, but usual.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from decoding.params import SamplingParams

MOST_TEXTS = 256  # prompts times n, in one request
M = TypeVar("M", bound=BaseModel)


class ApiError(Exception):
    """An error in the form of the API."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(_Body):
    """Of a stream."""

    include_usage: bool | None = None


class Sampling(_Body):
    """What completions of both kinds have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(allow_inf_nan=False)] | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None

    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """Return the settings of decoding: the request's, and `defaults` for what it leaves out; a seed drawn for this
        request where it has none. Raises ApiError for a value out of its range."""
        values = {name: getattr(self, name) for name in vars(defaults) if getattr(self, name, None) is not None}
        values["seed"] = secrets.randbits(32) if self.seed is None else self.seed % 2**63
        if self.top_k == -1:  # vLLM's word for off
            values["top_k"] = 0
        if (n := self.most_tokens()) is not None:
            values["max_new_tokens"] = max(n, 1)  # 0: one is drawn and not told
        try:
            return SamplingParams(**vars(defaults) | values)
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).split()[0]) from None

    def most_tokens(self) -> int | None:
        return self.max_tokens


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts as a list of texts or of ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if self.prompt and isinstance(self.prompt[0], int) else self.prompt


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def calls(self) -> bool:
        """Whether the answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def conversation(self) -> list[dict]:
        """Return the messages in the form of chat/messages.py. Raises ApiError for a message that is not text."""
        return [plain_message(i, message) for i, message in enumerate(self.messages)]


class TokenizeRequest(_Body):
    """POST /tokenize: a text or a conversation to ids. `content` is llama.cpp's name of `prompt`."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(_Body):
    """POST /detokenize: ids to a text."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def plain_message(i: int, message: dict[str, Any]) -> dict[str, Any]:
    """Return one message with its text as `content`, without keys that are null or unknown to us."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        other = next((part.get("type") for part in parts if part.get("type") != "text"), None)
        if other is not None or not all(isinstance(part.get("text"), str) for part in parts):
            what = f"found a part of type {other!r}" if other else "found a part without text"
            raise ApiError(400, f"messages.{i}.content: this model reads text, {what}", f"messages.{i}.content")
        content = "".join(part["text"] for part in parts)
    known = ("role", "reasoning_content", "tool_calls", "name", "tool_call_id")
    out = {key: message[key] for key in known if message.get(key) is not None}
    if out.get("role") == "developer":
        out["role"] = "system"
    if not out.get("tool_calls"):
        out.pop("tool_calls", None)
    calls = out.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():  # arguments: a text in the API, an object in templates
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):
                parsed = json.loads(function["arguments"])
                function["arguments"] = parsed if isinstance(parsed, dict) else function["arguments"]
    if content is not None or "tool_calls" not in out:
        out["content"] = content
    return out


def read_body(kind: type[M], raw: bytes) -> M:
    """Return the body of a request as `kind`. Raises ApiError that names what is wrong."""
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body should be a JSON object, found {values!r:.80}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ApiError(400, *describe(error)) from None


def describe(error: ValidationError) -> tuple[str, str]:
    """Return one sentence about the first thing that is wrong, and the name of the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0])
    same = [each for each in error.errors(include_url=False) if each["loc"][0] == first["loc"][0]]
    if first["type"] == "missing":
        return f"{field} is missing: it is required", field
    if len({each["loc"] for each in same}) > 1 and field in ("prompt", "stop"):  # one error for each form
        form = "a text, a list of texts, a list of ids or a list of lists of ids"
        form = form if field == "prompt" else "a text or a list of at most 16 texts"
        return f"{field} should be {form}", field
    path = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Input ").removeprefix("List ")
    return f"{path} {message}, found {first['input']!r:.100}", path

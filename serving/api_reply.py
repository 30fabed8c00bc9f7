"""The response to a request for answers: it waits for their jobs, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse, Response

from serving.api_answers import Choice, Part, timings, usage
from serving.api_requests import ApiError, Sampling
from serving.engine import BusyError
from serving.service import Service
from serving.tools import certain, split_calls

SECONDS_FOR_READER = 60.0  # a client that takes nothing for so long is gone


class Reply(Response, ABC):
    """Send the answers of a request when they are there. The jobs are cancelled when the client goes away."""

    id_prefix = kind = chunk_kind = ""

    def __init__(self, service: Service, request: Sampling, choices: list[Choice], path: str) -> None:
        """The choices share one event. path: for the metrics."""
        super().__init__()
        self.service, self.request, self.choices, self.path = service, request, choices, path
        self.changed, self.gone = choices[0].job.changed, False
        head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex[:24]}", "created": int(time.time())}
        self.head = head | {"model": service.name}

    @abstractmethod
    def whole(self, choice: Choice, part: Part) -> dict[str, Any]:
        """Return a choice that is complete."""

    @abstractmethod
    def chunk(self, choice: Choice, part: Part) -> list[dict[str, Any]]:
        """Return what a stream tells of a choice."""

    def opening(self) -> list[dict[str, Any]]:
        """Return what a stream tells first."""
        return []

    def submit(self) -> None:
        """Put the jobs into the queue. Raises ApiError where it is full."""
        try:
            self.service.engine.submit([choice.job for choice in self.choices])
        except BusyError as error:
            raise ApiError(429, str(error), code="busy", Retry_After=str(error.retry_after)) from None

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            status = await (self._stream if self.request.stream else self._whole)(scope, receive, send)
        finally:
            watcher.cancel()
            self.service.engine.cancel([choice.job for choice in self.choices if not choice.job.over])
        self._count(status)

    async def _watch(self, receive: Callable) -> None:
        """Note that the client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.changed.set()

    async def _change(self) -> bool:
        """Wait for something new; False when the client has gone."""
        await self.changed.wait()
        self.changed.clear()
        return not self.gone

    def _error(self) -> ApiError | None:
        """Return the first error of a job."""
        error = next((choice.job.error for choice in self.choices if choice.job.error), None)
        if error is None:
            return None
        if isinstance(error, TimeoutError):
            return ApiError(504, str(error), code="timeout")
        if isinstance(error, ValueError):
            return ApiError(400, str(error))
        return ApiError(500, f"decoding failed: {error}")

    async def _whole(self, scope: Any, receive: Callable, send: Callable) -> int | None:
        while not all(choice.job.over for choice in self.choices):
            if not await self._change():
                return None
            if any(choice.job.error for choice in self.choices):
                break
        if error := self._error():
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return error.status
        done = [self.whole(choice, choice.advance()) for choice in self.choices]
        body = self.head | {"object": self.kind, "choices": done, "usage": self.usage()}
        await JSONResponse(body | {"timings": timings(self.choices)})(scope, receive, send)
        return 200

    async def _stream(self, scope: Any, receive: Callable, send: Callable) -> int | None:
        """Headers are sent with the first token, so that an error before it is an answer with its status."""
        if not await self._change():
            return None
        if error := self._error():
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return error.status
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        events, error = self.opening(), None
        while not self.gone and error is None:
            over = all(choice.job.over for choice in self.choices)
            error = self._error()
            for choice in self.choices:
                if part := choice.advance():
                    events += self.chunk(choice, part)
            if error or over:
                break
            await self._write(send, events)
            events = []
            await self._change()
        if self.gone:
            return None
        tail = [error.body] if error else self._last()
        await self._write(send, events + tail, end=True)
        return error.status if error else 200

    async def _write(self, send: Callable, events: list[dict[str, Any]], end: bool = False) -> None:
        """Send events; a client that does not read them counts as gone."""
        lines = [f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n" for event in events]
        body = "".join([*lines, *(["data: [DONE]\n\n"] if end else [])]).encode(errors="replace")
        if not body:
            return
        try:
            message = {"type": "http.response.body", "body": body, "more_body": not end}
            await asyncio.wait_for(send(message), SECONDS_FOR_READER)
        except (asyncio.TimeoutError, OSError):
            self.gone = True

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk of a stream."""
        whole = {"object": self.chunk_kind, "choices": choices}
        options = self.request.stream_options
        return self.head | whole | ({"usage": None} if options and options.include_usage else {})

    def _last(self) -> list[dict[str, Any]]:
        """Return the chunk with the counts, where it is asked for."""
        options = self.request.stream_options
        if not (options and options.include_usage):
            return []
        return [self.event([]) | {"usage": self.usage(), "timings": timings(self.choices)}]

    def usage(self) -> dict[str, Any]:
        return usage(self.choices, self.request.n or 1)

    def _count(self, status: int | None) -> None:
        """Add this request to the metrics; status None: its client has gone."""
        metrics = self.service.metrics
        if status is None:
            metrics.cancelled += 1
        else:
            metrics.requests[self.path, status] += 1
        counts = self.usage()
        metrics.tokens["prompt"] += counts["prompt_tokens"]
        metrics.tokens["generated"] += counts["completion_tokens"]
        metrics.tokens["cached"] += counts["prompt_tokens_details"]["cached_tokens"]
        times = timings(self.choices)
        if status == 200:
            metrics.first_token.add(times["first_token_ms"] / 1000)
            metrics.total.add(times["total_ms"] / 1000)


class CompletionReply(Reply):
    """Of POST /v1/completions."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def whole(self, choice: Choice, part: Part) -> dict[str, Any]:
        logprobs = None if choice.job.top is None else choice.completion_logprobs(part.tokens)
        return {"index": choice.index, "text": part.text, "logprobs": logprobs, "finish_reason": part.ended}

    def chunk(self, choice: Choice, part: Part) -> list[dict[str, Any]]:
        if not (part.text or part.ended or choice.job.top is not None):
            return []
        return [self.event([self.whole(choice, part)])]


class ChatReply(Reply):
    """Of POST /v1/chat/completions. With tools, the text of a choice waits as long as it may be a call."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._texts: dict[int, tuple[str, int]] = {}  # with tools: the text of each choice, and how much of it is told

    def opening(self) -> list[dict[str, Any]]:
        return [self._delta(choice, {"role": "assistant", "content": ""}) for choice in self.choices]

    def whole(self, choice: Choice, part: Part) -> dict[str, Any]:
        text, calls = split_calls(part.text) if self.request.calls else (part.text, [])
        message = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        ended = self._reason(part, calls)
        return {"index": choice.index, "message": message, **self._logprobs(choice, part), "finish_reason": ended}

    def chunk(self, choice: Choice, part: Part) -> list[dict[str, Any]]:
        logprobs, out = self._logprobs(choice, part), []
        text, calls = self._certain(choice, part) if self.request.calls else (part.text, [])
        if text or logprobs["logprobs"]:
            out.append(self._delta(choice, {"content": text}, **logprobs))
        if calls:
            out.append(self._delta(choice, {"tool_calls": [{"index": i} | call for i, call in enumerate(calls)]}))
        if part.ended:
            out.append(self._delta(choice, {}, self._reason(part, calls)))
        return out

    def _certain(self, choice: Choice, part: Part) -> tuple[str, list[dict]]:
        """Return what of a choice's text can be told now, and at its end its calls."""
        text, told = self._texts.get(choice.index, ("", 0))
        text += part.text
        whole, calls = split_calls(text) if part.ended else (text[: certain(text)], [])
        self._texts[choice.index] = text, max(told, len(whole))
        return whole[told:], calls

    @staticmethod
    def _reason(part: Part, calls: list[dict]) -> str | None:
        return "tool_calls" if calls and part.ended == "stop" else part.ended

    def _logprobs(self, choice: Choice, part: Part) -> dict[str, Any]:
        return {"logprobs": None if choice.job.top is None else choice.chat_logprobs(part.tokens)}

    def _delta(self, choice: Choice, delta: dict, ended: str | None = None, **more: Any) -> dict[str, Any]:
        whole = {"index": choice.index, "delta": delta, "logprobs": None} | more
        return self.event([whole | {"finish_reason": ended}])

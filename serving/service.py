"""From a request of the API to jobs for the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from chat.messages import texts
from decoding.feeder import check_prompts
from decoding.params import SamplingParams, Stop
from serving.adjust import Grammar, penalties, schema_of
from serving.api_answers import Choice
from serving.api_requests import MOST_TEXTS, ApiError, ChatRequest, CompletionRequest, Sampling
from serving.assistant import Assistant
from serving.engine import Engine, Job
from serving.metrics import Metrics
from serving.streaming import StopStrings
from serving.tools import marks_in


@dataclass
class Service:
    """A model that is served, under its name."""

    name: str
    assistant: Assistant
    engine: Engine
    defaults: SamplingParams
    """settings of decoding that a request leaves out"""
    timeout: float
    """seconds that a request may take"""
    created: int = 0
    """time that /v1/models tells, in seconds since 1970"""
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def context(self) -> int:
        """Longest text, in tokens."""
        return self.engine.rows.cache.max_len

    @cached_property
    def _most_bytes(self) -> int:
        """Bytes above which no prompt fits, however it is encoded."""
        return self.context * int(self.assistant.tokenizer.token_bytes().max())

    def completion(self, request: CompletionRequest) -> list[Choice]:
        """Return the choices of a request for completions, prompt by prompt. Raises ApiError."""
        if request.suffix:
            raise ApiError(400, "suffix is not offered: this model only continues texts", "suffix")
        if request.best_of not in (None, request.n or 1):
            raise ApiError(400, f"best_of is not offered, found {request.best_of}: leave it out, or use n", "best_of")
        given = request.prompts()
        if not given:
            raise ApiError(400, "prompt is an empty list: give at least one text", "prompt")
        plain = request.add_special_tokens is False
        prompts = [self.encode(text, plain) if isinstance(text, str) else text for text in given]
        echo, choices = bool(request.echo), []
        for text, prompt in zip(given, prompts):
            shown = text if isinstance(text, str) or not echo else self.assistant.tokenizer.decode(prompt)
            job = {"echo": echo and request.logprobs is not None, "top": request.logprobs}
            choices += self.choices(request, prompt, shown if echo else "", **job)
        return self.checked(choices)

    def chat(self, request: ChatRequest) -> list[Choice]:
        """Return the choices of a request for an answer in a conversation. Raises ApiError."""
        messages = request.conversation()
        if request.tool_choice not in (None, "auto", "none"):
            message = f"tool_choice should be auto or none, found {request.tool_choice!r:.80}: a call cannot be forced"
            raise ApiError(400, message, "tool_choice")
        if request.calls:
            messages[0] |= {"tools": self.tools(request)}
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs true", "top_logprobs")
        top = (request.top_logprobs or 0) if request.logprobs else None
        schema = schema_of(request.response_format)
        return self.checked(self.choices(request, self.prompt_of(messages), schema=schema, top=top))

    def tools(self, request: ChatRequest) -> list[dict]:
        """Return the tools of a request. Raises ApiError for one without a name, and where the template has no place
        for them."""
        for i, tool in enumerate(request.tools or []):
            function = tool.get("function")
            if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]):
                name = f"tools.{i}.function.name"
                raise ApiError(400, f"{name} is missing: an answer names the function that it calls", name)
        template = self.assistant.template
        if template is not None and "tools" not in template.rendered:
            raise ApiError(400, f"the chat template of {self.name} has no tools: leave them out", "tools")
        return request.tools or []

    def prompt_of(self, messages: list[dict]) -> list[int]:
        """Return the prompt of a conversation. Raises ApiError."""
        if self.assistant.template is None:
            raise ApiError(
                400, f"{self.name} has no chat template, it only continues texts: POST to /v1/completions", "messages"
            )
        self._check_size(sum(map(len, texts([[*message.values()] for message in messages]))), "messages")
        try:
            return self.assistant.encode(messages)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None

    def encode(self, text: str, plain: bool = False) -> list[int]:
        """Return the prompt of a text; plain: without the ids that begin texts. Raises ApiError."""
        self._check_size(len(text), "prompt")
        try:
            return self.assistant.tokenizer.encode(text) if plain else self.assistant.encode_text(text)
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from None

    def _check_size(self, n_characters: int, param: str) -> None:
        """Raise ApiError for a text that is too long whatever it says, before it is encoded."""
        if n_characters > self._most_bytes:
            message = f"{param}: {n_characters} characters do not fit into the {self.context} tokens of this model"
            raise ApiError(400, message, param, "context_length_exceeded")

    def choices(
        self, request: Sampling, prompt: list[int], prefix: str = "", schema: dict | None = None, **job: Any
    ) -> list[Choice]:
        """Return the n choices for one prompt; choice i is drawn with seed + i. schema: what they have to keep."""
        params, own = request.sampling(self.defaults), self.assistant
        try:
            server_s = [string.decode() for string in own.stop_strings.strings]
            strings = StopStrings(own.tokenizer, [*server_s, *request.stop_strings()])
        except ValueError as error:
            raise ApiError(400, f"stop: {error}", "stop") from None
        ids = set() if request.ignore_eos and schema is None else self.ends()
        inner = penalties(request, own.model.args.vocab_size)
        grammar = None if schema is None else Grammar(own.tokenizer, self.ends(), schema)
        shared = {"stop": Stop(ids, strings.ended)}
        shared |= {"streams": bool(request.stream), "deadline": time.monotonic() + self.timeout}
        choices = []
        for i in range(request.n or 1):
            seeded = SamplingParams(**vars(params) | {"seed": (params.seed + i) % 2**63})
            adjust = grammar.adjust(inner) if grammar else inner
            one = Job(prompt, seeded, adjust=adjust, **shared, **job)
            drawn = request.most_tokens() != 0
            names = marks_in(own.tokenizer) if getattr(request, "calls", False) else {}
            choices.append(Choice(one, i, own.tokenizer, strings, prefix, drawn=drawn, visible=names))
        return choices

    def ends(self) -> set[int]:
        """Return the ids that end an answer."""
        return {*self.assistant.stop.ids, self.assistant.tokenizer.eos_id} - {None}

    def checked(self, choices: list[Choice]) -> list[Choice]:
        """Number the choices, and let them share one event. Raises ApiError where there are too many, or a prompt that
        the model cannot take."""
        if len(choices) > MOST_TEXTS:
            raise ApiError(400, f"a request has at most {MOST_TEXTS} prompts times n, found {len(choices)}", "n")
        for i, choice in enumerate(choices):
            choice.index, choice.job.changed = i, choices[0].job.changed
        try:
            check_prompts(self.assistant.model, [choice.job.prompt for choice in choices], self.context)
        except ValueError as error:
            too_long = any(len(choice.job.prompt) > self.context for choice in choices)
            raise ApiError(400, str(error), "prompt", "context_length_exceeded" if too_long else None) from None
        return choices

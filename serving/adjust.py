"""What a request does to the logits before an id is drawn: penalties, biases, a grammar that the answer has to keep."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch

from cli.extras import install_command
from decoding.fixed_rows import Adjust
from decoding.params import Ids
from serving.api_requests import ApiError, Sampling
from tokenizer import Tokenizer


def penalties(request: Sampling, vocab_size: int) -> Adjust | None:
    """Return the penalties and biases of a request; None: it has none. Raises ApiError for an unknown id.

    OpenAI's formula: the bias of an id is added to its logit; an id that the answer has n times loses n times
    frequency_penalty, and presence_penalty.
    """
    frequency, presence = request.frequency_penalty or 0.0, request.presence_penalty or 0.0
    bias = request.logit_bias or {}
    if not (frequency or presence or bias):
        return None
    wrong = next((i for i in bias if not (i.isascii() and i.isdigit() and len(i) < 12 and int(i) < vocab_size)), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias: the model has ids 0..{vocab_size - 1}, found {wrong!r:.40}", "logit_bias")
    biased = torch.tensor([int(i) for i in bias], dtype=torch.long)

    def adjust(logits: torch.Tensor, answer: Ids) -> torch.Tensor:
        device, out = logits.device, logits.float().clone()
        here = biased < len(out)  # rows of padding have no logit
        out[biased[here].to(device)] += torch.tensor(list(bias.values()))[here].to(device)
        if answer and (frequency or presence):
            ids, n = torch.tensor(answer, device=device).unique(return_counts=True)
            out[ids] -= frequency * n + presence
        return out

    return adjust


class Grammar:
    """A JSON schema that answers have to keep, by llguidance."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int], schema: dict[str, Any]) -> None:
        """stop_ids: what ends an answer; one at least. Raises ApiError where the schema cannot be used, or llguidance
        is not installed."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            message = f"response_format needs llguidance on the server's machine: {install_command('serve')}"
            raise ApiError(400, message, "response_format") from None
        self._matcher = LLMatcher
        self._tokenizer = ll_tokenizer(tokenizer, tuple(sorted(stop_ids)))
        # without white space that may go on for ever, as that of a small model does
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            self._text = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
            wrong = LLMatcher.validate_grammar(self._text, self._tokenizer)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            why = wrong.split("<state>")[0].strip()  # what follows is llguidance's own state
            raise ApiError(400, f"response_format: this schema cannot be kept: {why}", "response_format")

    def adjust(self, inner: Adjust | None) -> Adjust:
        """Return what masks the logits of one answer, after `inner` has changed them. It remembers the answer."""
        matcher, seen = self._matcher(self._tokenizer, self._text), 0

        def adjust(logits: torch.Tensor, answer: Ids) -> torch.Tensor:
            nonlocal seen
            matcher.consume_tokens(list(answer[seen:]))
            seen = len(answer)
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))[: len(logits)]
            if matcher.is_error() or not allowed.any():
                raise ValueError(f"the grammar of response_format cannot go on: {matcher.get_error()}")
            changed = inner(logits, answer) if inner else logits.float()
            return changed.masked_fill(~allowed.to(logits.device), -torch.inf)

        return adjust


class View:
    """A tokenizer with the names that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], eos_id: int) -> None:
        self.tokens, self.eos_token_id, self.bos_token_id = tokens, eos_id, tokenizer.bos_id
        self.special_token_ids, self._encode = sorted(tokenizer.special.values()), tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


@cache
def ll_tokenizer(tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> Any:
    """Return llguidance's view of a tokenizer."""
    from llguidance import LLTokenizer, TokenizerWrapper

    ids = range(tokenizer.vocab_size)
    names = [tokenizer.id_to_bytes(i) or tokenizer.decode([i], skip_special=False).encode() for i in ids]
    view = View(tokenizer, names, stop_ids[0])
    return LLTokenizer(TokenizerWrapper(view), eos_token=list(stop_ids))


def schema_of(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the JSON schema that `response_format` asks for; None: no schema. Raises ApiError for another form."""
    kind = (response_format or {}).get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = response_format.get("json_schema") if response_format else None
    schema = schema.get("schema") if isinstance(schema, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        message = 'response_format should be text, json_object, or json_schema with {"json_schema": {"schema": {...}}}'
        raise ApiError(400, message, "response_format")
    return schema

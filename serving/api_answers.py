"""From tokens to the answers of OpenAI's API: texts, reasons of ending, log-probabilities, counts."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from decoding.rows import Token
from serving.engine import Job
from serving.streaming import Pieces, StopStrings
from tokenizer import Tokenizer


@dataclass
class Part:
    """What is new of a choice."""

    text: str
    tokens: list[Token]
    ended: str | None


@dataclass
class Choice:
    """One answer of a request, which grows with its job."""

    job: Job
    index: int
    tokenizer: Tokenizer
    stop_strings: StopStrings
    prefix: str = ""
    """text before the answer (echo)"""
    told: int = 0
    """number of the job's tokens that were sent to the client"""
    visible: dict[int, bytes] = field(default_factory=dict)
    """special tokens that are part of the text"""
    drawn: bool = True
    """False: the one token that is drawn is not part of the answer (max_tokens 0)"""
    _names: dict[int, tuple[str, list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pieces, self._ended = Pieces(self.tokenizer, self.stop_strings, self.visible), False
        self._offsets = codecs.getincrementaldecoder("utf8")(errors="replace")
        self._offset = -1 if self.prefix and self.tokenizer.dummy_prefix else 0

    def advance(self) -> Part | None:
        """Return what is new since the last call; None where nothing is."""
        over = self.job.ended  # before the tokens are looked at: afterwards none come
        tokens = self.job.tokens[self.told :]
        if self._ended or not (tokens or over):
            return None
        n_echoed = len(self.job.prompt) if self.job.echo else 0
        text, self.prefix = self.prefix, ""
        for at, token in enumerate(tokens, self.told):
            if at >= n_echoed and self.drawn and token.id not in self.job.stop.ids and not self._pieces.ended:
                text += self._pieces.add(token.id)
        self.told += len(tokens)
        if over:
            text, self._ended = text + self._pieces.rest(), True
        if over and not self.drawn:
            tokens, over = tokens[:-1], "length"
        return Part(text, tokens, over)

    def n_drawn(self) -> int:
        """Return the number of tokens of the answer."""
        echoed = len(self.job.prompt) if self.job.echo else 0
        return max(len(self.job.tokens) - echoed, 0) if self.drawn else 0

    def named(self, i: int) -> tuple[str, list[int]]:
        """Return the name of an id and its bytes; the bytes of half a character are escaped in the name."""
        if i not in self._names:
            special = self.tokenizer.decode([i], skip_special=False)
            raw = self.tokenizer.id_to_bytes(i) or special.encode()
            try:
                name = raw.decode()
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._names[i] = name, list(raw)
        return self._names[i]

    def completion_logprobs(self, tokens: Sequence[Token]) -> dict[str, list]:
        """Return `logprobs` of /v1/completions for the next tokens."""
        out: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            known = not math.isnan(token.logprob)
            top: dict[str, float] = {}
            for i, logprob in (*token.top, (token.id, token.logprob)):
                top.setdefault(self.named(i)[0], finite(logprob))
            out["tokens"].append(self.named(token.id)[0])
            out["token_logprobs"].append(finite(token.logprob) if known else None)
            out["top_logprobs"].append(top if known else None)
            out["text_offset"].append(max(self._offset, 0))
            self._offset += len(self._offsets.decode(self.tokenizer.id_to_bytes(token.id)))
        return out

    def chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, list]:
        """Return `logprobs` of /v1/chat/completions for the next tokens, without a stop id."""

        def entry(i: int, logprob: float) -> dict[str, Any]:
            name, raw = self.named(i)
            return {"token": name, "logprob": finite(logprob), "bytes": raw}

        shown = [token for token in tokens if token.id not in self.job.stop.ids]
        tops = ({"top_logprobs": [entry(*each) for each in token.top]} for token in shown)
        return {"content": [entry(token.id, token.logprob) | top for token, top in zip(shown, tops)], "refusal": None}


def finite(logprob: float) -> float:
    """Return a number that JSON can hold, as OpenAI's API does."""
    return max(logprob, -9999.0)


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """Return the counts of tokens; a prompt counts once for its n choices."""
    firsts = choices[::n]
    prompt, drawn = sum(len(c.job.prompt) for c in firsts), sum(c.n_drawn() for c in choices)
    cached = {"cached_tokens": sum(c.job.cached for c in firsts)}
    counts = {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
    return counts | {"prompt_tokens_details": cached}


def timings(choices: Sequence[Choice]) -> dict[str, float]:
    """Return where the time of a request went, in milliseconds: in the queue, until the first token, in all."""
    times = [choice.job.times for choice in choices]
    came, ended = min(t["came"] for t in times), max(t.get("ended", t["came"]) for t in times)
    begun = min(t.get("begun", ended) for t in times)
    first = min(t.get("first", ended) for t in times)
    out = {"queue_ms": begun - came, "first_token_ms": first - came, "total_ms": ended - came}
    return {name: round(1000 * seconds, 3) for name, seconds in out.items()}

"""Beam search: look for the likeliest sequence by following the best few unfinished ones at every step.

The bookkeeping is that of transformers' `generate(num_beams=...)`, and the answers are the same token for token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from attention.cache import KVCache
from decoding.decoder import Decoder
from decoding.feeder import Feeder, check_prompts, evaluating
from decoding.params import NEVER, Ids, SamplingParams, Stop
from model import Transformer


@dataclass(frozen=True)
class BeamParams:
    """Settings of the search."""

    num_beams: int = 4
    """Number of unfinished sequences to follow, and of finished ones to keep."""
    length_penalty: float = 1.0
    """Sequences are compared by log-probability / tokens^length_penalty: above 0 favours long ones, below 0 short."""
    early_stopping: bool | Literal["never"] = False
    """True: stop with num_beams finished sequences; "never": stop when no unfinished one can become better (with a
    length_penalty above 0 it could at full length); False: stop when none would be better if it ended at this step."""
    max_new_tokens: int = 256
    """Largest number of tokens in an answer."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of its range."""
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be at least 1, found {getattr(self, name)}")
        if not -100 <= self.length_penalty <= 100:
            raise ValueError(f"length_penalty should be from -100 to 100, found {self.length_penalty}")


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence."""

    ids: list[int]
    """without the prompt and without the stop id"""
    logprob: float
    """natural logarithm of its probability, its stop id included"""
    score: float
    """logprob / tokens^length_penalty"""


class _Candidate(NamedTuple):
    """A sequence that goes on by one token."""

    beam: int  # row of the batch it continues
    ids: list[int]  # after the prompt, its stop id included
    logprob: float


def beam_search(
    model: Transformer, prompt: Ids, params: BeamParams, stop: Stop = NEVER, cache: str = "static"
) -> list[Hypothesis]:
    """Return the best sequences that follow `prompt`, at most num_beams, the best first.

    A sequence is finished by `stop`, after max_new_tokens, or when the context is full. cache: its kind
    (attention/cache.py). Raises ValueError as `check_prompts` does.
    """
    check_prompts(model, [prompt])
    max_len = min(params.max_new_tokens, model.args.max_seq_len + 1 - len(prompt))
    feed = Feeder(model, model.make_cache(1, len(prompt) + max_len - 1, kind=cache))
    running, finished = [_Candidate(0, [], 0.0)], []
    with evaluating(model):
        logits = feed([prompt], [0])[:, 0]  # (1, V)
        while True:
            candidates = _continuations(running, logits, params.num_beams * max(2, 1 + len(stop.ids)))
            over = [c.ids[-1] in stop.ids or len(c.ids) == max_len or stop.ended(c.ids) for c in candidates]
            # A sequence may finish only among the best num_beams; the further candidates replace those that do.
            for c, is_over in zip(candidates[: params.num_beams], over):
                if is_over:
                    ids = c.ids[:-1] if c.ids[-1] in stop.ids else c.ids
                    finished.append(Hypothesis(ids, c.logprob, c.logprob / len(c.ids) ** params.length_penalty))
            finished = sorted(finished, key=lambda h: -h.score)[: params.num_beams]
            running = [c for c, is_over in zip(candidates, over) if not is_over][: params.num_beams]
            if not running or _done(running, finished, max_len, params):
                return finished
            feed.cache.reorder(torch.tensor([c.beam for c in running], device=feed.device))
            logits = feed([c.ids[-1:] for c in running], [feed.cache.length] * len(running))[:, 0]  # (beams, V)


def _continuations(running: Sequence[_Candidate], logits: torch.Tensor, n: int) -> list[_Candidate]:
    """Return the n likeliest sequences that continue one of `running` by one id, the likeliest first."""
    so_far = torch.tensor([beam.logprob for beam in running], device=logits.device)
    logprobs = (logits.float().log_softmax(-1) + so_far[:, None]).flatten()  # (beams x V,)
    best, at = logprobs.topk(min(n, len(logprobs)))
    # index in the flat (beams x V) -> beam and id
    places = (divmod(i, logits.shape[-1]) for i in at.tolist())
    return [_Candidate(b, [*running[b].ids, token], lp) for (b, token), lp in zip(places, best.tolist())]


def _done(running: Sequence[_Candidate], finished: Sequence[Hypothesis], max_len: int, params: BeamParams) -> bool:
    """Return whether the search ends although some sequences could go on."""
    if len(finished) < params.num_beams:
        return False
    if params.early_stopping is True:
        return True
    at_length = max_len if params.early_stopping == "never" and params.length_penalty > 0 else len(running[0].ids)
    return running[0].logprob / at_length**params.length_penalty <= finished[-1].score


class Beam(Decoder):
    """Decode by beam search: the best answer comes as a whole at the end of the search."""

    def __init__(self, model: Transformer, num_beams: int, length_penalty: float = 1.0) -> None:
        """Raises ValueError as `BeamParams` does."""
        self.model, self.search = model, BeamParams(num_beams, length_penalty)

    def stream(
        self, prompt: Ids, params: SamplingParams, stop: Stop = NEVER, cache: KVCache | str = "static"
    ) -> Iterator[int]:
        """Return an iterator over the ids of the best answer. Only `max_new_tokens` of `params` has an effect. A cache
        that is passed in is left as it is, because the rows of the search are its beams."""
        search = replace(self.search, max_new_tokens=params.max_new_tokens)
        kind = cache if isinstance(cache, str) else "static"
        return iter(beam_search(self.model, prompt, search, stop, kind)[0].ids)

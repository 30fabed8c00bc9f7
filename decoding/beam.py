"""Beam search: the likeliest sequence, as far as keeping the best few unfinished ones at every step can find it.

The bookkeeping is that of transformers' `generate(num_beams=...)`, whose answers it gives, token for token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from decoding.generate import Ended, Feeder, check_prompts, evaluating
from model import Transformer


@dataclass(frozen=True)
class BeamParams:
    """How the search goes."""

    num_beams: int = 4
    """Unfinished sequences that are followed, and finished ones that are kept."""
    length_penalty: float = 1.0
    """Sequences are compared by log-probability / tokens^this: above 0 favours long ones, below 0 short ones."""
    early_stopping: bool | Literal["never"] = False
    """True: done with num_beams finished sequences; "never": when none can become better (for a length_penalty above
    0, at full length); False: when none would be if it ended here."""
    max_new_tokens: int = 256
    """The longest answer, in tokens."""

    def __post_init__(self) -> None:
        """Raises ValueError on a value that makes no sense."""
        if self.num_beams < 1 or self.max_new_tokens < 1:
            name = "num_beams" if self.num_beams < 1 else "max_new_tokens"
            raise ValueError(f"{name} should be at least 1, found {getattr(self, name)}")
        if not -100 <= self.length_penalty <= 100:
            raise ValueError(f"length_penalty should be from -100 to 100, found {self.length_penalty}")


@dataclass(frozen=True)
class Hypothesis:
    """A sequence that has been found."""

    ids: list[int]
    """without the prompt and without the stop id"""
    logprob: float
    """natural logarithm of its probability, that of its stop id included"""
    score: float
    """logprob / tokens^length_penalty"""


@dataclass(frozen=True)
class _Candidate:
    """A sequence that goes on by one token."""

    beam: int  # row of the batch it continues
    ids: list[int]  # after the prompt, its stop id included
    logprob: float


def beam_search(
    model: Transformer,
    prompt: Sequence[int],
    params: BeamParams,
    stop_ids: Collection[int] = (),
    cache: str = "static",
    ended: Ended | None = None,
) -> list[Hypothesis]:
    """The best sequences found to follow `prompt`, at most num_beams, the best first.

    A sequence is finished with a stop id, when it has `ended`, after max_new_tokens or when the context is full.
    `cache`: of which kind (see attention/cache.py).
    Raises ValueError as `check_prompts` does.
    """
    check_prompts(model, [prompt])
    max_len = min(params.max_new_tokens, model.args.max_seq_len + 1 - len(prompt))
    feed = Feeder(model, model.make_cache(1, len(prompt) + max_len - 1, kind=cache))
    running, finished = [_Candidate(0, [], 0.0)], []
    with evaluating(model):
        logits = feed([prompt], [0])[:, 0]  # (1, V)
        while True:
            candidates = _continuations(running, logits, params.num_beams * max(2, 1 + len(stop_ids)))
            over = [c.ids[-1] in stop_ids or len(c.ids) == max_len or bool(ended and ended(c.ids)) for c in candidates]
            # What finishes counts only among the best; the others are there to fill the places of those that do.
            best = zip(candidates[: params.num_beams], over)
            finished += [_hypothesis(c, stop_ids, params.length_penalty) for c, is_over in best if is_over]
            finished = sorted(finished, key=lambda h: -h.score)[: params.num_beams]
            running = [c for c, is_over in zip(candidates, over) if not is_over][: params.num_beams]
            if not running or _done(running, finished, max_len, params):
                return finished
            feed.cache.reorder(torch.tensor([c.beam for c in running], device=feed.device))
            logits = feed([c.ids[-1:] for c in running], [feed.cache.length] * len(running))[:, 0]  # (beams, V)


def _continuations(running: Sequence[_Candidate], logits: torch.Tensor, n: int) -> list[_Candidate]:
    """The n likeliest sequences that are one of `running` and one id more, the likeliest first."""
    so_far = torch.tensor([beam.logprob for beam in running], device=logits.device)
    logprobs = (logits.float().log_softmax(-1) + so_far[:, None]).flatten()  # (beams x V,)
    best, at = logprobs.topk(min(n, len(logprobs)))
    places = (divmod(i, logits.shape[-1]) for i in at.tolist())
    return [_Candidate(b, [*running[b].ids, token], lp) for (b, token), lp in zip(places, best.tolist())]


def _hypothesis(candidate: _Candidate, stop_ids: Collection[int], length_penalty: float) -> Hypothesis:
    ids, logprob = candidate.ids, candidate.logprob
    score = logprob / len(ids) ** length_penalty
    return Hypothesis(ids[:-1] if ids[-1] in stop_ids else ids, logprob, score)


def _done(running: Sequence[_Candidate], finished: Sequence[Hypothesis], max_len: int, params: BeamParams) -> bool:
    """Whether the search ends although some sequences could go on."""
    if len(finished) < params.num_beams:
        return False
    if params.early_stopping is True:
        return True
    at_length = max_len if params.early_stopping == "never" and params.length_penalty > 0 else len(running[0].ids)
    return running[0].logprob / at_length**params.length_penalty <= finished[-1].score

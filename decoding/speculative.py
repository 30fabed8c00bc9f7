"""Speculative decoding: something cheap guesses a few tokens, the model judges all of them in one pass.

A guess x drawn from q is kept with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from
max(p - q, 0), normalised; after a run of kept guesses the same pass gives one token more. What comes out follows the
model's own distribution p exactly (Leviathan et al. 2023, arXiv:2211.17192, appendix A.1), p and q both being what
`process_logits` leaves, so at temperature 0 it is greedy decoding, token for token (up to the rounding of a pass over
several tokens; and where rotary angles depend on the text's length, such as dynamic NTK's beyond the window, to what
the guesses add to that length).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

import torch
import torch.nn.functional as F

from attention.cache import KVCache, keep_prefix
from decoding.generate import Feeder, evaluating, open_cache
from decoding.params import SamplingParams
from decoding.sampling import draw, probabilities, process_logits
from model import Transformer


class Drafter(Protocol):
    """What guesses."""

    vocab_size: int

    def propose(
        self, ids: Sequence[int], n: int, params: SamplingParams, generator: torch.Generator
    ) -> tuple[list[int], torch.Tensor]:
        """Up to `n` ids that may follow `ids`, and the distributions (n, V) they were drawn from."""


class DraftModel:
    """Guesses with a smaller model of the same vocabulary, whose cache follows whatever becomes of the guesses."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.vocab_size = model, model.args.vocab_size
        self._feed = Feeder(model, model.make_cache(1))
        self._fed: list[int] = []  # the cache holds the first `cache.length` of these ids

    def propose(
        self, ids: Sequence[int], n: int, params: SamplingParams, generator: torch.Generator
    ) -> tuple[list[int], torch.Tensor]:
        n = min(n, self.model.args.max_seq_len + 1 - len(ids))  # its context may be the shorter one
        cache, drafted, q = self._feed.cache, list(ids), []
        keep_prefix(cache, ids, self._fed)
        with evaluating(self.model):
            for _ in range(n):
                self._fed = list(drafted)
                logits = self._feed([drafted[cache.length :]], [cache.length])[:, 0]  # (1, V)
                q.append(probabilities(process_logits(logits, [drafted], params)))
                drafted += draw(q[-1], [generator])
        return drafted[len(ids) :], torch.cat(q) if q else torch.empty(0, self.vocab_size)


class PromptLookup:
    """Guesses that what followed the last few ids where they stood before will follow again: good for texts that repeat
    themselves or their prompt (Saxena 2023, prompt lookup decoding). No model, no arithmetic."""

    def __init__(self, vocab_size: int, longest: int = 3) -> None:
        self.vocab_size, self.longest = vocab_size, longest

    def propose(
        self, ids: Sequence[int], n: int, params: SamplingParams, generator: torch.Generator
    ) -> tuple[list[int], torch.Tensor]:
        drafted = self._continuation(list(ids), n)
        certain = F.one_hot(torch.tensor(drafted, dtype=torch.long), self.vocab_size)  # q is 1 for each guess
        return drafted, certain.double()

    def _continuation(self, ids: list[int], n: int) -> list[int]:
        """What followed the latest earlier occurrence of the longest run, of up to `longest` ids, that ends `ids`;
        where the text ends before n ids have followed, it is taken to go round again."""
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == ids[-size:]:
                    return list(islice(cycle(ids[start + size :]), n))
        return []


@dataclass
class Tally:
    """How the guesses fared."""

    passes: int = 0
    """of the model over the guesses"""
    drafted: int = 0
    """guesses"""
    accepted: int = 0
    """of them, those that were kept"""

    def __str__(self) -> str:
        share = self.accepted / max(self.drafted, 1)
        each = 1 + self.accepted / max(self.passes, 1)
        return f"{self.accepted} of {self.drafted} drafted tokens accepted ({share:.0%}), {each:.2f} tokens a pass"


class Speculator:
    """A model and what guesses for it. `stream` is `generate.stream`, faster; `tally` counts over all of its calls."""

    def __init__(self, model: Transformer, drafter: Drafter, n_draft: int = 4) -> None:
        """n_draft: guesses a pass. Raises ValueError when the drafter has another vocabulary."""
        if drafter.vocab_size != model.args.vocab_size:
            raise ValueError(
                f"the draft has {drafter.vocab_size} ids, the model {model.args.vocab_size}: "
                "a draft needs the vocabulary of the model it guesses for"
            )
        if n_draft < 1:
            raise ValueError(f"there should be at least 1 drafted token a pass, found {n_draft}")
        self.model, self.drafter, self.n_draft = model, drafter, n_draft
        self.tally = Tally()

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop_ids: Collection[int] = (),
        cache: KVCache | str = "static",
    ) -> Iterator[int]:
        """Ids that follow one prompt, of the distribution of `generate.stream`; arguments and errors are the same,
        and a cache that forgets is refused."""
        cache = open_cache(self.model, [prompt], params.max_new_tokens, cache)
        if not cache.can_rewind:
            raise ValueError("a cache with sinks cannot take guesses back; use the static or int8 cache with a draft")
        return self._stream(list(prompt), params, frozenset(stop_ids), Feeder(self.model, cache))

    def _stream(self, ids: list[int], params: SamplingParams, stop_ids: Collection[int], feed: Feeder) -> Iterator[int]:
        max_len = min(len(ids) + params.max_new_tokens, feed.cache.max_len + 1)
        generator = torch.Generator().manual_seed(params.seed)
        with evaluating(self.model):
            try:
                while len(ids) < max_len:
                    for token in self._round(feed, ids, max_len - 1 - len(ids), params, generator):
                        if token in stop_ids:
                            return
                        ids.append(token)
                        yield token
            finally:
                feed.cache.truncate(len(ids) - 1)  # guesses that nobody took

    def _round(
        self, feed: Feeder, ids: list[int], room: int, params: SamplingParams, generator: torch.Generator
    ) -> list[int]:
        """The next ids, at least one and at most room + 1, from one pass of the model."""
        drafted, q = self.drafter.propose(ids, min(self.n_draft, room), params, generator)
        past = feed.cache.length
        logits = feed([ids[past:] + drafted], [past], n=len(drafted) + 1)[0]  # (n + 1, V)
        history = [ids + drafted[:n] for n in range(len(drafted) + 1)]  # each guess is part of what the next repeats
        p = probabilities(process_logits(logits, history, params))
        kept, last = verify(drafted, p, q.to(p), generator)
        feed.cache.truncate(len(ids) + kept)
        self.tally.passes += 1
        self.tally.drafted += len(drafted)
        self.tally.accepted += kept
        return [*drafted[:kept], last]


def verify(drafted: Sequence[int], p: torch.Tensor, q: torch.Tensor, generator: torch.Generator) -> tuple[int, int]:
    """How many of the n `drafted` ids are kept, and the id after them. p (n + 1, V): the distributions wanted at their
    places and after them; q (n, V): those they were drawn from."""
    for i, token in enumerate(drafted):
        u = float(torch.rand(1, generator=generator, dtype=torch.float64))
        if u * q[i, token] >= p[i, token]:
            missing = (p[i] - q[i]).clamp(min=0)
            if not missing.any():  # nothing but rounding parts p from q
                missing = p[i]
            return i, draw(missing[None], [generator])[0]
    return len(drafted), draw(p[-1:], [generator])[0]

"""Speculative decoding: a cheap drafter guesses a few tokens, and the model checks all of them in one pass.

A guess x drawn from q is kept with probability min(1, p(x) / q(x)). The first guess that is not kept is replaced by a
draw from max(p - q, 0), normalised; if all are kept, the same pass gives one token more. The output follows the model's
own distribution p exactly (Leviathan et al. 2023, arXiv:2211.17192, appendix A.1). p and q are the distributions after
`process_logits`, so at temperature 0 the output is that of greedy decoding, token for token. Two differences remain:
the rounding of a pass over several tokens; and, where rotary angles depend on the length of the text (dynamic NTK
beyond its window), the guesses add to that length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

import torch
import torch.nn.functional as F

from attention.cache import KVCache, keep_prefix
from decoding.decoder import Decoder
from decoding.feeder import Feeder, check_prompts, drawable, evaluating
from decoding.params import NEVER, Ids, SamplingParams, Stop
from decoding.sampling import draw, probabilities, process_logits
from model import Transformer

Guesses = tuple[list[int], torch.Tensor]  # n ids, and the distributions (n, V) that they were drawn from


class Drafter(Protocol):
    """A source of guesses."""

    vocab_size: int

    def propose(self, ids: Ids, n: int, params: SamplingParams, generator: torch.Generator) -> Guesses:
        """Return up to `n` guesses of what follows `ids`."""


class DraftModel:
    """Guess with a smaller model of the same vocabulary; its cache forgets the guesses that were not kept."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.vocab_size = model, drawable(model)
        self._feed = Feeder(model, model.make_cache(1))
        self._fed: list[int] = []  # the cache holds the first `cache.length` of these ids

    def propose(self, ids: Ids, n: int, params: SamplingParams, generator: torch.Generator) -> Guesses:
        n = min(n, self.model.args.max_seq_len + 1 - len(ids))  # the context of the draft may be shorter
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
    """Guess the ids that followed an earlier occurrence of the last few ids: good for texts that repeat themselves or
    their prompt (Saxena 2023, prompt lookup decoding). No model is needed."""

    def __init__(self, vocab_size: int, longest: int = 3) -> None:
        self.vocab_size, self.longest = vocab_size, longest

    def propose(self, ids: Ids, n: int, params: SamplingParams, generator: torch.Generator) -> Guesses:
        # the ends of earlier occurrences of the last ids: of the most ids first, and of these the latest first
        ends = (
            start + size
            for size in range(min(self.longest, len(ids) - 1), 0, -1)
            for start in range(len(ids) - size - 1, -1, -1)
            if ids[start : start + size] == ids[-size:]
        )
        # Where the text ends before n ids, continue from that occurrence again.
        drafted = list(islice(cycle(ids[next(ends, len(ids)) :]), n))
        certain = F.one_hot(torch.tensor(drafted, dtype=torch.long), self.vocab_size)  # q is 1 for each guess
        return drafted, certain.double()


@dataclass
class Tally:
    """Counts over all calls: passes of the model, guesses, and guesses that were kept."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        share = self.accepted / max(self.drafted, 1)
        each = 1 + self.accepted / max(self.passes, 1)
        return f"{self.accepted} of {self.drafted} drafted tokens accepted ({share:.0%}), {each:.2f} tokens a pass"


class Speculative(Decoder):
    """Decode with a drafter that guesses ahead; `tally` counts over all calls."""

    def __init__(self, model: Transformer, drafter: Drafter, n_draft: int = 4) -> None:
        """n_draft: number of guesses a pass. Raises ValueError when the drafter has another vocabulary."""
        if drafter.vocab_size != drawable(model):
            raise ValueError(
                f"the draft has {drafter.vocab_size} ids, the model {drawable(model)}: "
                "a draft needs the same vocabulary as the model"
            )
        if n_draft < 1:
            raise ValueError(f"there should be at least 1 drafted token a pass, found {n_draft}")
        self.model, self.drafter, self.n_draft = model, drafter, n_draft
        self.tally = Tally()

    def stream(
        self, prompt: Ids, params: SamplingParams, stop: Stop = NEVER, cache: KVCache | str = "static"
    ) -> Iterator[int]:
        """Return an iterator over ids of the same distribution as those of `generate.stream`. Raises ValueError as that
        does, and for a cache that forgets."""
        if isinstance(cache, str):
            room = min(self.model.args.max_seq_len, len(prompt) + params.max_new_tokens)
            cache = self.model.make_cache(1, room, kind=cache)
        if not cache.can_rewind:
            raise ValueError("a cache with sinks cannot take guesses back; use the static or int8 cache with a draft")
        check_prompts(self.model, [prompt], cache.max_len, cache.length)
        return self._stream(list(prompt), params, stop, Feeder(self.model, cache))

    def _stream(self, ids: list[int], params: SamplingParams, stop: Stop, feed: Feeder) -> Iterator[int]:
        start = len(ids)
        max_len = min(start + params.max_new_tokens, feed.cache.max_len + 1)
        generator = torch.Generator().manual_seed(params.seed)
        with evaluating(self.model):
            try:
                while len(ids) < max_len:
                    for token in self._round(feed, ids, max_len - 1 - len(ids), params, generator):
                        if token in stop.ids:
                            return
                        ids.append(token)
                        yield token
                        if stop.ended(ids[start:]):
                            return
            finally:
                feed.cache.truncate(len(ids) - 1)  # forget the kept guesses that the caller did not take

    def report(self) -> str:
        return str(self.tally)

    def _round(
        self, feed: Feeder, ids: list[int], room: int, params: SamplingParams, generator: torch.Generator
    ) -> list[int]:
        """Return the next ids, at least one and at most room + 1, from one pass of the model."""
        drafted, q = self.drafter.propose(ids, min(self.n_draft, room), params, generator)
        past = feed.cache.length
        logits = feed([ids[past:] + drafted], [past], n=len(drafted) + 1)[0]  # (n + 1, V)
        # each guess counts for the repetition penalty of the next
        history = [ids + drafted[:n] for n in range(len(drafted) + 1)]
        p = probabilities(process_logits(logits, history, params))
        kept, last = verify(drafted, p, q.to(p), generator)
        feed.cache.truncate(len(ids) + kept)
        self.tally.passes += 1
        self.tally.drafted += len(drafted)
        self.tally.accepted += kept
        return [*drafted[:kept], last]


def verify(drafted: Ids, p: torch.Tensor, q: torch.Tensor, generator: torch.Generator) -> tuple[int, int]:
    """Return how many of the n `drafted` ids are kept, and the id that follows these.

    p (n + 1, V): the model's distributions, in the places of the guesses and after the last. q (n, V): the
    distributions that the guesses were drawn from.
    """
    for i, token in enumerate(drafted):
        # Keep the guess with probability min(1, p / q), written without a division by q.
        u = float(torch.rand(1, generator=generator, dtype=torch.float64))
        if u * q[i, token] >= p[i, token]:
            missing = (p[i] - q[i]).clamp(min=0)
            if not missing.any():  # p and q differ by rounding only
                missing = p[i]
            return i, draw(missing[None], [generator])[0]
    return len(drafted), draw(p[-1:], [generator])[0]

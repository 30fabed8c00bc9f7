"""The decoding loop: texts that are decoded together, where each may come and go between two steps.

    rows = Rows(model)
    row = rows.add(prompt, params)
    while rows:
        for row, token in rows.step(): ...

`generate` and `stream` (generate.py) add all rows first; a server adds a row when a request comes and removes it when
its reader leaves. The ids of a row depend on its own prompt, settings and seed, and not on its neighbours, up to the
rounding of batched matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import torch

from attention.cache import KVCache
from decoding.feeder import Feeder, check_prompts, evaluating
from decoding.params import NEVER, Ids, SamplingParams, Stop
from decoding.sampling import draw, penalise, probabilities, process_logits
from decoding.threads import Threads
from model import Transformer


class Token(NamedTuple):
    """An id and its probability."""

    id: int
    logprob: float
    """natural logarithm of the probability under the model itself: before penalty, temperature and truncation"""
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest ids in this place with their log-probabilities, the likeliest first"""


@dataclass
class _Row:
    """One text that is being decoded."""

    key: int
    ids: list[int]  # the prompt and the answer so far
    start: int  # length of the prompt
    max_len: int  # `ids` ends at this length
    params: SamplingParams  # with seed 0: rows of equal settings are sampled together
    generator: torch.Generator
    stop: Stop
    top: int | None


class Rows:
    """The texts that are decoded together; `step` makes each of them one token longer.

    `len(rows)` is the number of rows that have not ended; `row in rows` says whether a row is one of them.
    """

    def __init__(self, model: Transformer, max_len: int | None = None, cache: KVCache | str = "static") -> None:
        """max_len: room for a text, in tokens (default: the model's context). cache: a kind of cache (see
        attention/cache.py), or a cache with one row for each prompt that is added before the first step; it may hold
        the first `cache.length` ids of these prompts, and only the rest is fed."""
        self.model, self._max_len = model, max_len
        self._kind, self._first = (cache, None) if isinstance(cache, str) else ("static", Feeder(model, cache))
        # A cache without rows says how long a text may be, and refuses a kind that the model cannot have.
        self._feed = self._first or self._new_feeder(0)
        self._waiting: list[_Row] = []  # added since the last step: their prompts have not been fed
        self._running: list[_Row] = []  # row i of the cache holds all ids of _running[i] but the last
        self._keys = count()
        self._threads = Threads()

    @property
    def max_len(self) -> int:
        """The longest prompt, in tokens."""
        return self._feed.cache.max_len

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def __contains__(self, key: int) -> bool:
        return any(row.key == key for row in (*self._waiting, *self._running))

    def add(self, prompt: Ids, params: SamplingParams, stop: Stop = NEVER, top: int | None = None) -> int:
        """Add a text that follows `prompt`; return its key, by which `step` and `remove` name the row.

        The row ends by `stop`, after `params.max_new_tokens`, or when the context is full: when no position is left for
        its last id. top: number of likeliest ids to report with each token; None: its log-probability is not computed
        either (nan). Raises ValueError as `check_prompts` does.
        """
        check_prompts(self.model, [prompt], self.max_len, self._first.cache.length if self._first else 0)
        generator = torch.Generator().manual_seed(params.seed)
        max_len = min(len(prompt) + params.max_new_tokens, self.max_len + 1)
        row = _Row(next(self._keys), list(prompt), len(prompt), max_len, replace(params, seed=0), generator, stop, top)
        self._waiting.append(row)
        return row.key

    def remove(self, key: int) -> None:
        """Stop decoding a row. A row that has ended already may be removed again."""
        self._waiting = [row for row in self._waiting if row.key != key]
        self._keep([i for i, row in enumerate(self._running) if row.key != key])

    def step(self) -> list[tuple[int, Token]]:
        """Make every row one token longer. Return the key and the token of each row that grew, in the order in which
        the rows were added; a row that ended with a stop id has no token. Rows that have ended leave."""
        if not self:
            return []
        grown, going = [], []
        with self._threads.step(len(self._running) + sum(len(row.ids) for row in self._waiting)):
            with evaluating(self.model):
                logits = self._next_logits()  # (B, V)
            tokens = score(logits, choose(logits, self._running), [row.top for row in self._running])
        for i, (row, token) in enumerate(zip(self._running, tokens)):
            if token.id in row.stop.ids:
                continue
            row.ids.append(token.id)
            grown.append((row.key, token))
            if len(row.ids) < row.max_len and not row.stop.ended(row.ids[row.start :]):
                going.append(i)
        self._keep(going)
        return grown

    def _next_logits(self) -> torch.Tensor:
        """Return the logits (B, V) that follow the last id of each row, running rows first, then waiting ones.

        Feed the last id of each running row, and of each waiting row the whole prompt less what the cache holds. After
        the call the waiting rows are running rows.
        """
        parts = []
        if self._running:
            last = [row.ids[-1:] for row in self._running]
            parts.append(self._feed(last, [len(row.ids) - 1 for row in self._running])[:, 0])  # (running, V)
        if self._waiting:
            # Prompts are fed in a cache of their own: beside them, rows with one new token would be mostly padding,
            # and the padding could lie beyond the end of the cache.
            feed = self._first or self._new_feeder(len(self._waiting))
            past = feed.cache.length
            parts.append(feed([row.ids[past:] for row in self._waiting], [past] * len(self._waiting))[:, 0])
            if self._running:
                self._feed.cache.append(feed.cache)
            else:
                self._feed = feed
            self._running, self._waiting, self._first = self._running + self._waiting, [], None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _new_feeder(self, batch: int) -> Feeder:
        return Feeder(self.model, self.model.make_cache(batch, self._max_len, kind=self._kind))

    def _keep(self, going: list[int]) -> None:
        """Let all running rows but those with the indices `going` leave the batch and the cache."""
        if 0 < len(going) < len(self._running):
            self._feed.cache.reorder(torch.tensor(going, device=self._feed.device))
        self._running = [self._running[i] for i in going]


def choose(logits: torch.Tensor, rows: Sequence[_Row]) -> list[int]:
    """Draw the next id of each of B rows from logits (B, V); rows of equal settings are processed together."""
    chosen = [0] * len(rows)
    for params in dict.fromkeys(row.params for row in rows):
        at = [i for i, row in enumerate(rows) if row.params == params]
        group = logits if len(at) == len(rows) else logits[at]  # (rows of these settings, V)
        history = [rows[i].ids for i in at]
        if params.temperature == 0:  # nothing is drawn
            ids = penalise(group, history, params).argmax(-1).tolist()
        else:
            weights = probabilities(process_logits(group, history, params))
            ids = draw(weights, [rows[i].generator for i in at])
        for i, token in zip(at, ids):
            chosen[i] = token
    return chosen


def score(logits: torch.Tensor, chosen: Ids, top: Sequence[int | None]) -> list[Token]:
    """Return the `chosen` id of each row of logits (B, V) as a token, with its log-probability and the top[i] likeliest
    ids; with neither where top[i] is None."""
    most = max((n for n in top if n is not None), default=None)
    if most is None:
        return [Token(i, math.nan) for i in chosen]
    logprobs = logits.float().log_softmax(-1)  # (B, V)
    best, ids = logprobs.topk(min(most, logits.shape[-1]))  # (B, most)
    own = logprobs.gather(-1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0]  # (B,)
    likeliest = (tuple(zip(*row)) for row in zip(ids.tolist(), best.tolist()))
    scored = zip(chosen, own.tolist(), likeliest, top)
    return [Token(i, math.nan) if n is None else Token(i, logprob, first[:n]) for i, logprob, first, n in scored]

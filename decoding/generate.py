"""Decoding: from prompts to ids, one loop for one prompt or many, greedy or sampled.

`Feeder` calls the model, `decode` is the loop around it; `generate`, `generate_scored`, `generate_in_batches` and
`stream` are what others call. sampling.py says how the next id is chosen, speculative.py and beam.py are other loops.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from attention.cache import KVCache
from cli.progress import Progress
from decoding import cpu_step
from decoding.params import SamplingParams
from decoding.sampling import draw, probabilities, process_logits
from model import Transformer

Ended = Callable[[Sequence[int]], bool]  # of an answer's ids so far: is the last one its end? StopStrings.ended is one


class Token(NamedTuple):
    """An id and how likely it was."""

    id: int
    logprob: float
    """natural logarithm of the probability the model itself gave it: before penalty, temperature and truncation"""
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest ids in its place with theirs, the likeliest first"""


class Feeder:
    """The one place where a model is called: ids go in, logits come out, and `cache` remembers."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.device = model.device
        self.few = cpu_step.MOST_TOKENS.get(model.dtype, 0)

    @torch.inference_mode()
    def __call__(self, runs: Sequence[Sequence[int]], past: Sequence[int], n: int = 1) -> torch.Tensor:
        """Feed B unequal runs of ids, that of row i from position past[i] on; the logits (B, n, V) that follow the
        last n ids of each run.

        An interrupted pass (Ctrl-C) leaves the cache's length as it was, since some layers have stored and others not.
        """
        width, length = max(map(len, runs)), self.cache.length
        if sum(map(len, runs)) <= self.few and self.step is not None:
            return self.step(runs, past, n)
        lengths = [n + len(ids) for n, ids in zip(past, runs)]
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in runs], device=self.device)  # (B, T)
        positions = torch.tensor(past, device=self.device)[:, None] + torch.arange(width, device=self.device)  # (B, T)
        try:
            hidden = self.model.hidden(tokens, positions=positions, cache=self.cache, lengths=lengths)  # (B, T, dim)
        except BaseException:
            self.cache.truncate(length)
            raise
        ends = torch.tensor([len(ids) for ids in runs], device=self.device)
        last = ends[:, None] + torch.arange(-n, 0, device=self.device)  # (B, n)
        return self.model.logits(hidden[torch.arange(len(runs), device=self.device)[:, None], last])

    @cached_property
    def step(self) -> cpu_step.Step | None:
        """The faster way to feed a few ids, where there is one."""
        return cpu_step.stepper(self.model, self.cache)


@contextlib.contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """The model in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass
class _Row:
    """One sequence that is being decoded."""

    index: int  # of its prompt
    ids: list[int]  # prompt and what has been generated
    start: int  # of what has been generated
    max_len: int  # ids stop growing here
    generator: torch.Generator


def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    cache: KVCache | str = "static",
    ended: Ended | None = None,
    top: int | None = None,
) -> Iterator[tuple[int, Token]]:
    """Generates (row, Token) pairs, one a step for every row that goes on.

    A row ends before a stop id, with the id after which it has `ended`, after `max_new_tokens`, or when the context is
    full: when its last id has no position left from which to predict another. Finished rows leave the batch. `cache`:
    the kind of a new one, or one that already holds the first `cache.length` ids of every prompt, so that only the rest
    is fed. Log-probabilities are there (else nan) if `top`, how many of the likeliest ids to tell beside the chosen
    one's, is not None. Raises ValueError at once, as `open_cache` does.
    """
    cache = open_cache(model, prompts, params.max_new_tokens, cache)
    rows = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seeds[i] if seeds is not None else params.seed + i)
        max_len = min(len(prompt) + params.max_new_tokens, cache.max_len + 1)
        rows.append(_Row(i, list(prompt), len(prompt), max_len, generator))
    return _decode(Feeder(model, cache), rows, params, frozenset(stop_ids), ended, top)


def _decode(
    feed: Feeder,
    rows: list[_Row],
    params: SamplingParams,
    stop_ids: frozenset[int],
    ended: Ended | None,
    top: int | None,
) -> Iterator[tuple[int, Token]]:
    past = [feed.cache.length] * len(rows)  # how many ids of each row the cache holds
    with evaluating(feed.model):
        while rows:
            logits = feed([row.ids[n:] for row, n in zip(rows, past)], past)[:, 0]  # (B, V)
            left = process_logits(logits, [row.ids for row in rows], params)
            chosen = draw(probabilities(left), [row.generator for row in rows])
            going = []
            for i, (row, token) in enumerate(zip(rows, score(logits, chosen, top))):
                if token.id in stop_ids:
                    continue
                row.ids.append(token.id)
                yield row.index, token
                if len(row.ids) < row.max_len and not (ended and ended(row.ids[row.start :])):
                    going.append(i)
            if 0 < len(going) < len(rows):
                feed.cache.reorder(torch.tensor(going, device=feed.device))
            rows = [rows[i] for i in going]
            past = [len(row.ids) - 1 for row in rows]


def score(logits: torch.Tensor, chosen: Sequence[int], top: int | None) -> list[Token]:
    """The `chosen` id of every row of logits (B, V) with its log-probability and the `top` likeliest; None: neither."""
    if top is None:
        return [Token(i, math.nan) for i in chosen]
    logprobs = logits.float().log_softmax(-1)  # (B, V)
    best, ids = logprobs.topk(min(top, logits.shape[-1]))  # (B, top)
    mine = logprobs.gather(-1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0]
    pairs = (tuple(zip(*row)) for row in zip(ids.tolist(), best.tolist()))
    return [Token(*token) for token in zip(chosen, mine.tolist(), pairs)]


def open_cache(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, cache: KVCache | str = "static"
) -> KVCache:
    """The cache to continue `prompts` in: `cache` itself, or a new one of that kind with room for what can follow.

    Raises ValueError as `check_prompts` does, and for a cache that leaves nothing of a prompt to feed.
    """
    if isinstance(cache, str):
        longest = max(map(len, prompts), default=0) + max_new_tokens
        cache = model.make_cache(len(prompts), min(model.args.max_seq_len, longest), kind=cache)
    check_prompts(model, prompts, cache.max_len)
    for prompt in prompts:
        if cache.length >= len(prompt):
            raise ValueError(f"the cache holds {cache.length} ids, the prompt {len(prompt)}: nothing is left to feed")
    return cache


def check_prompts(model: Transformer, prompts: Sequence[Sequence[int]], longest: int | None = None) -> None:
    """Raise ValueError for a prompt that is empty, holds ids the model does not have, or is longer than `longest`,
    by default the model's context."""
    longest, vocab_size = longest or model.args.max_seq_len, model.args.vocab_size
    for i, prompt in enumerate(prompts):
        where = f"prompt {i + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise ValueError(f"{where} is empty; give at least one id, such as the tokenizer's bos")
        if len(prompt) > longest:
            raise ValueError(f"{where} is {len(prompt)} tokens long, the model takes {longest}; shorten it")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(f"{where} holds id {wrong}, the model has 0..{vocab_size - 1}: is this its tokenizer?")


def generate_scored(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    cache: str = "static",
    ended: Ended | None = None,
    top: int | None = 0,
) -> list[list[Token]]:
    """What `generate` gives, with the log-probability of every id under the model itself and those of the `top`
    likeliest ids in its place."""
    answers: list[list[Token]] = [[] for _ in prompts]
    for row, token in decode(model, prompts, params, stop_ids, seeds, cache, ended, top):
        answers[row].append(token)
    return answers


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    cache: str = "static",
    ended: Ended | None = None,
) -> list[list[int]]:
    """What follows each of the prompts (unequal lengths are fine), without the prompt and without the stop id.

    A row's sample depends on its own seed (default: params.seed + row) and not on its neighbours, up to the rounding
    of batched matrix products. `cache`: its kind (attention/cache.py). A row that has `ended` keeps the ids that spell
    its stop string (streaming.text_pieces leaves them out). Raises ValueError as `check_prompts` does.
    """
    answers = generate_scored(model, prompts, params, stop_ids, seeds, cache, ended, top=None)
    return [[token.id for token in answer] for answer in answers]


def generate_in_batches(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    batch_size: int = 32,
    cache: str = "static",
    ended: Ended | None = None,
) -> Iterator[list[int]]:
    """The answers of `generate` to any number of prompts, in their order, with progress on stderr."""
    with Progress("answering", "answers", total=len(prompts)) as shown:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            seeds = [params.seed + start + i for i in range(len(part))]
            yield from generate(model, part, params, stop_ids, seeds, cache, ended)
            shown.add(len(part))


def stream(
    model: Transformer,
    prompt: Sequence[int],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    cache: KVCache | str = "static",
) -> Iterator[int]:
    """The ids that `generate` gives for one prompt, one by one. A `cache` of one row that holds the first
    `cache.length` ids of the prompt spares feeding them again; afterwards it holds all ids but the last."""
    return (token.id for _, token in decode(model, [prompt], params, stop_ids, cache=cache))

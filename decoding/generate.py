"""From prompts to ids, greedy or sampled: offline callers of `Rows`, for one prompt or many."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from attention.cache import KVCache
from cli.progress import Progress
from decoding.decoder import Decoder
from decoding.feeder import check_prompts
from decoding.params import NEVER, Ended, SamplingParams, Stop
from decoding.rows import Rows, Token
from model import Transformer


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    cache: str = "static",
    ended: Ended | None = None,
) -> list[list[int]]:
    """Return the ids that follow each of the prompts (of any lengths), without the prompt and without the stop id.

    Row i draws with seeds[i], by default params.seed + i. cache: its kind (attention/cache.py). stop_ids, ended: see
    `Stop`; a row that has `ended` keeps the ids that spell its stop string (streaming.text_pieces leaves them out).
    Raises ValueError as `check_prompts` does.
    """
    answers = generate_scored(model, prompts, params, stop_ids, seeds, cache, ended, top=None)
    return [[token.id for token in answer] for answer in answers]


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
    """Return what `generate` does, each id with its log-probability under the model itself and the `top` likeliest ids
    in its place; None: with neither."""
    rows = Rows(model, _room(model, prompts, params), cache)
    check_prompts(model, prompts, rows.max_len)
    seeds = range(params.seed, params.seed + len(prompts)) if seeds is None else seeds
    stop = Stop(frozenset(stop_ids), ended)
    answers = {rows.add(p, replace(params, seed=seed), stop, top): [] for p, seed in zip(prompts, seeds)}
    while rows:
        for row, token in rows.step():
            answers[row].append(token)
    return list(answers.values())


def generate_in_batches(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    batch_size: int = 32,
    cache: str = "static",
    ended: Ended | None = None,
) -> Iterator[list[int]]:
    """Yield the answers of `generate` to any number of prompts, in their order, with progress on stderr."""
    with Progress("answering", "answers", total=len(prompts)) as progress:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            seeds = range(params.seed + start, params.seed + start + len(part))
            yield from generate(model, part, params, stop_ids, seeds, cache, ended)
            progress.add(len(part))


def stream(
    model: Transformer,
    prompt: Sequence[int],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    cache: KVCache | str = "static",
    ended: Ended | None = None,
) -> Iterator[int]:
    """Return an iterator over the ids that `generate` gives for one prompt; see `Decoder.stream`."""
    rows = Rows(model, _room(model, [prompt], params), cache)
    rows.add(prompt, params, Stop(frozenset(stop_ids), ended))
    return (token.id for step in iter(rows.step, []) for _, token in step)


def _room(model: Transformer, prompts: Sequence[Sequence[int]], params: SamplingParams) -> int:
    """Return the number of tokens for which a cache needs room."""
    return min(model.args.max_seq_len, max(map(len, prompts), default=0) + params.max_new_tokens)


class Sampled(Decoder):
    """Draw one id after the other, as `SamplingParams` says; greedy at temperature 0."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, stop: Stop = NEVER, cache: KVCache | str = "static"
    ) -> Iterator[int]:
        return stream(self.model, prompt, params, stop.ids, cache, stop.ended)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        stop: Stop = NEVER,
        cache: str = "static",
        batch_size: int = 32,
    ) -> Iterator[list[int]]:
        return generate_in_batches(self.model, prompts, params, stop.ids, batch_size, cache, stop.ended)

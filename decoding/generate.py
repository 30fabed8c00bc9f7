"""From prompts to ids, greedy or sampled: offline callers of `Rows`, for one prompt or many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from attention.cache import KVCache
from cli.progress import Progress
from decoding.decoder import Decoder
from decoding.feeder import check_prompts
from decoding.params import NEVER, Ids, SamplingParams, Stop
from decoding.rows import Rows, Token
from model import Transformer


def generate(
    model: Transformer,
    prompts: Sequence[Ids],
    params: SamplingParams,
    stop: Stop = NEVER,
    seeds: Sequence[int] | None = None,
    cache: str = "static",
) -> list[list[int]]:
    """Return the new ids of each prompt, without the prompt and the stop id; prompts may differ in length.

    seeds: one for each prompt; by default prompt i has params.seed + i. cache: static, int8 or sinks. The ids that
    spell a stop string stay in the result (serving.streaming.text_pieces removes its text). Raises ValueError as
    `check_prompts` does.
    """
    answers = generate_scored(model, prompts, params, stop, seeds, cache, top=None)
    return [[token.id for token in answer] for answer in answers]


def generate_scored(
    model: Transformer,
    prompts: Sequence[Ids],
    params: SamplingParams,
    stop: Stop = NEVER,
    seeds: Sequence[int] | None = None,
    cache: str = "static",
    top: int | None = 0,
) -> list[list[Token]]:
    """Return what `generate` does, each id with its log-probability under the model itself and the `top` likeliest ids
    in its place; None: with neither."""
    rows = Rows(model, _room(model, prompts, params), cache)
    check_prompts(model, prompts, rows.max_len)
    seeds = range(params.seed, params.seed + len(prompts)) if seeds is None else seeds
    answers = {rows.add(p, replace(params, seed=seed), stop, top): [] for p, seed in zip(prompts, seeds)}
    while rows:
        for row, token in rows.step():
            answers[row].append(token)
    return list(answers.values())


def stream(
    model: Transformer, prompt: Ids, params: SamplingParams, stop: Stop = NEVER, cache: KVCache | str = "static"
) -> Iterator[int]:
    """Return an iterator over the ids that `generate` gives for one prompt; see `Decoder.stream`."""
    rows = Rows(model, _room(model, [prompt], params), cache)
    rows.add(prompt, params, stop)
    return (token.id for step in iter(rows.step, []) for _, token in step)


def _room(model: Transformer, prompts: Sequence[Ids], params: SamplingParams) -> int:
    """Return the number of tokens for which a cache needs room."""
    return min(model.args.max_seq_len, max(map(len, prompts), default=0) + params.max_new_tokens)


class Sampled(Decoder):
    """Draw one id after the other, as `SamplingParams` says; greedy at temperature 0."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def stream(
        self, prompt: Ids, params: SamplingParams, stop: Stop = NEVER, cache: KVCache | str = "static"
    ) -> Iterator[int]:
        return stream(self.model, prompt, params, stop, cache)

    def answers(
        self,
        prompts: Sequence[Ids],
        params: SamplingParams,
        stop: Stop = NEVER,
        cache: str = "static",
        batch_size: int = 32,
    ) -> Iterator[list[int]]:
        with Progress("answering", "answers", total=len(prompts)) as progress:
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                yield from generate(self.model, part, replace(params, seed=params.seed + start), stop, cache=cache)
                progress.add(len(part))

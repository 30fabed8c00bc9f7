"""Measure tokens a second of greedy decoding against transformers' `generate`, with the same weights.

    python bench/decode.py                              # 2, 15 and 60 million parameters, fp32 and bf16, 1 and 8 rows
    python bench/decode.py --sizes 15M --batch 1 --repeats 9

All variants take turns in one process, one short answer each, so that a change of the machine's speed affects them all;
the ratio to transformers is the median of the ratios within a round. transformers decodes greedily without an end, in
evaluation and inference mode, with its default cache; the table has the share of its ids that are the same as ours.

"of read rate" is the rate at which a step of one row reads the weights, as a share of the rate at which this machine
reads memory, measured in the same rounds. At 1 decoding cannot be faster; it is above 1 when the weights stay in the
processor's cache.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.extras import need

need("bench/decode.py", "bench", "transformers")

from bench.train_speed import SHAPES, peer
from decoding import cpu_step
from decoding.feeder import Feeder
from decoding.pages import in_huge_pages
from model import Transformer

PROMPT = 16  # tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = ("ours", "ours uncompiled", "transformers", "transformers compiled")
Answer = tuple[list[float], list[list[int]]]  # times of the start and after every step; ids of every step


@dataclass(frozen=True)
class Args:
    """Compare the speed of decoding."""

    sizes: tuple[Literal["2M", "15M", "60M"], ...] = ("2M", "15M", "60M")
    """models to measure"""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """dtypes of the weights"""
    batch: tuple[int, ...] = (1, 8)
    """numbers of rows that are decoded together"""
    variants: tuple[Literal[VARIANTS], ...] = VARIANTS[:3]  # type: ignore[valid-type]
    """variants to compare; "ours uncompiled" does not use cpu_step.cpp; "transformers compiled" has a static cache and
    a compiled forward pass, which takes about a minute more for each row of the table"""
    tokens: int = 64
    """tokens in an answer"""
    repeats: int = 5
    """measured answers of each variant, after one warm-up"""
    threads: int = field(default_factory=torch.get_num_threads)
    """processor cores"""
    out: Path | None = None
    """also write the rows as JSON"""


class Clock:
    """A streamer for transformers' `generate` that records the time of every token."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        """Record the time; the first call is for the prompt."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: no token is buffered."""


def ours(model: Transformer, prompts: list[list[int]], tokens: int, fast: bool) -> Answer:
    """Decode greedily with our model: the loop of `Rows` without sampling."""
    moments, steps, runs, past = [time.perf_counter()], [], prompts, [0] * len(prompts)
    feed = Feeder(model, model.make_cache(len(prompts), PROMPT + tokens))
    if not fast:
        feed.step = None
    while len(steps) < tokens:
        steps.append(feed(runs, past)[:, 0].argmax(-1).tolist())
        past = [n + len(run) for n, run in zip(past, runs)]
        runs = [[id] for id in steps[-1]]
        moments.append(time.perf_counter())
    return moments, steps


@torch.inference_mode()
def theirs(model: nn.Module, prompts: list[list[int]], tokens: int, **options: Any) -> Answer:
    """Decode greedily with transformers' `generate`."""
    clock, inputs = Clock(), torch.tensor(prompts)
    start = time.perf_counter()
    ids = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=None,
        streamer=clock,
        **options,
    )
    return [start, *clock.moments[1:]], ids[:, PROMPT:].T.tolist()


def make(variant: str, model: Transformer, prompts: list[list[int]], tokens: int) -> Callable[[], Answer]:
    """Return a function that decodes one answer to each prompt."""
    if variant.startswith("ours"):
        return lambda: ours(model, prompts, tokens, fast=variant == "ours")
    other = peer(model).to(model.lm_head.weight.dtype).eval()
    if variant == "transformers":
        return lambda: theirs(other, prompts, tokens)
    other.forward = torch.compile(other.forward, dynamic=False)
    return lambda: theirs(other, prompts, tokens, cache_implementation="static")


def read_rate(numbers: torch.Tensor) -> float:
    """Return the rate of reading all the numbers once, in bytes a second."""
    start = time.perf_counter()
    numbers.sum()
    return numbers.nbytes / (time.perf_counter() - start)


def measure(name: str, dtype: str, batch: int, args: Args) -> list[dict]:
    """Return the rows of the table for one size, dtype and batch."""
    torch.manual_seed(0)
    shape = SHAPES[name][0].replace(max_seq_len=1024)
    model = Transformer(shape).to(DTYPES[dtype]).eval()
    in_huge_pages(model)  # as eval.py and serve.py do
    prompts = torch.randint(0, shape.vocab_size, (batch, PROMPT)).tolist()
    run = {variant: make(variant, model, prompts, args.tokens) for variant in args.variants}
    steps = {variant: decode()[1] for variant, decode in run.items()}  # compiles, warms up
    moments: dict[str, list[list[float]]] = {variant: [] for variant in args.variants}
    memory, rates = torch.ones(2**26), []  # 256 MiB: more than any processor's cache
    for _ in range(args.repeats):
        for variant, decode in run.items():
            moments[variant].append(decode()[0])
        rates.append(read_rate(memory))
    weights = sum(p.nbytes for p in model.parameters())  # tied: the embedding is read as the head
    table = []
    for variant, answers in moments.items():
        seconds = [answer[-1] - answer[0] for answer in answers]
        latency = sorted(b - a for answer in answers for a, b in pairwise(answer[1:]))
        median = statistics.median(latency)
        row = {"model": name, "dtype": dtype, "batch": batch, "variant": variant, "threads": args.threads}
        row["tokens_per_second"] = batch * args.tokens / statistics.median(seconds)
        row["first_token_ms"] = 1e3 * statistics.median(answer[1] - answer[0] for answer in answers)
        row |= {"p50_ms": 1e3 * median, "p99_ms": 1e3 * latency[int(0.99 * len(latency))]}
        row |= {"read_gb_per_second": max(rates) / 1e9, "of_read_rate": weights / median / max(rates)}
        if "transformers" in moments:
            other = [answer[-1] - answer[0] for answer in moments["transformers"]]
            row["times_transformers"] = statistics.median(b / a for a, b in zip(seconds, other))
            same = [a == b for one, two in zip(steps[variant], steps["transformers"]) for a, b in zip(one, two)]
            row["same_ids"] = sum(same) / len(same)
        table.append(row)
    return table


def main(args: Args) -> list[dict]:
    """Measure, print a table, and return its rows."""
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.repeats} interleaved answers of {args.tokens} tokens"
    )
    if "ours" in args.variants and cpu_step.compiled_step() is None:
        print("the decoding step could not be compiled here: ours is ours uncompiled")
    print(
        f"{'model':6}{'dtype':6}{'rows':>4} {'variant':22}{'tok/s':>8}{'x transformers':>16}{'first ms':>10}"
        f"{'p50 ms':>9}{'p99 ms':>9}{'of read rate':>14}{'same ids':>10}"
    )
    table = []
    for name in args.sizes:
        for dtype in args.dtypes:
            for batch in args.batch:
                for row in measure(name, dtype, batch, args):
                    table.append(row)
                    nothing = float("nan")
                    print(
                        f"{name:6}{dtype:6}{batch:4} {row['variant']:22}{row['tokens_per_second']:8.0f}"
                        f"{row.get('times_transformers', nothing):16.2f}{row['first_token_ms']:10.1f}"
                        f"{row['p50_ms']:9.2f}{row['p99_ms']:9.2f}{row['of_read_rate']:14.0%}"
                        f"{row.get('same_ids', nothing):10.0%}",
                        flush=True,
                    )
                torch._dynamo.reset()
    print(f"memory is read at {max(row['read_gb_per_second'] for row in table):.1f} GB/s")
    if args.out:
        args.out.write_text(json.dumps(table, indent=2))
    return table


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

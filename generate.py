"""Decoding: from prompts to ids, one loop for one prompt or many, greedy or sampled.

`process_logits` says which ids may follow and how likely each is, `draw` picks one of them, `decode` is the loop around
the model and its cache; `generate`, `stream` and `ChatSession` are what others call.
"""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from tqdm import tqdm

from cache import KVCache
from model import Transformer
from tokenizer import ChatTemplate, Tokenizer

PLAIN_LINE_SECONDS = 10  # between lines of progress where there is no terminal for a bar


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen."""

    temperature: float = 0.7
    """Divides the logits: below 1 is safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int = 40
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold this share of the probability (nucleus); 1: from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability; 0: none."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that have occurred less likely (Keskar et al. 2019, CTRL); 1: off."""
    max_new_tokens: int = 256
    """The longest answer, in tokens."""
    seed: int = 0
    """Of the random draws; row i of a batch uses seed + i."""

    def __post_init__(self) -> None:
        """Raises ValueError on a value that makes no sense."""
        expected = {
            "temperature": (self.temperature == 0 or 0.01 <= self.temperature <= 100, "0 or from 0.01 to 100"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100 (1 is off)"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        }
        for name, (right, range_) in expected.items():
            if not right:
                raise ValueError(f"{name} should be {range_}, found {getattr(self, name)}")


def process_logits(logits: torch.Tensor, history: Sequence[Sequence[int]], params: SamplingParams) -> torch.Tensor:
    """The logits (B, V) to draw from, float32, -inf for ids that are out; `logits` itself stays as it is.

    history: the B rows' ids so far, prompt included, for the repetition penalty. The order is Hugging Face's: penalty,
    temperature, top-k, top-p, min-p; each works on what the one before has left. At temperature 0 one id is left.
    """
    logits = logits.float()
    if params.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, ids in zip(seen, history):
            row[torch.tensor(sorted(set(ids)), dtype=torch.long, device=row.device)] = True
        # A negative logit is multiplied: divided, it would become likelier.
        penalised = torch.where(logits < 0, logits * params.repetition_penalty, logits / params.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if params.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / params.temperature
    if params.top_k:
        least = logits.topk(min(params.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)  # ties with the k-th stay
    if params.top_p < 1:
        ascending, order = logits.sort(-1)
        out = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p  # the tail whose mass the nucleus can do without
        out[:, -1] = False
        logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
    if params.min_p:
        probability = logits.softmax(-1)
        weak = probability < params.min_p * probability.amax(-1, keepdim=True)
        logits = logits.masked_fill(weak, -torch.inf)
    return logits


def draw(logits: torch.Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """One id a row from softmax(logits), (B, V): row i by inverting its distribution at the next number in [0, 1)
    of generators[i] (on the CPU), so what a row draws depends neither on its neighbours nor on the device."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    mass = logits.to(wide).softmax(-1).cumsum(-1)  # (B, V); an id of probability 0 adds nothing and is never hit
    u = torch.cat([torch.rand(1, generator=g, dtype=wide) for g in generators]).to(mass.device)
    return torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True)[:, 0].tolist()


@dataclass
class _Row:
    """One sequence that is being decoded."""

    index: int  # of its prompt
    ids: list[int]  # prompt and what has been generated
    max_len: int  # ids stop growing here
    generator: torch.Generator


def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    cache: KVCache | None = None,
) -> Iterator[tuple[int, int]]:
    """Generates (row, id) pairs, one a step for every row that goes on.

    A row ends before a stop id, after `max_new_tokens`, or when the context is full: when its last id has no position
    left from which to predict another. Finished rows leave the batch. `cache`, if given, already holds the first
    `cache.length` ids of every prompt; only the rest is fed. Prompts are to be checked before (`check_prompts`).
    """
    context = min(model.args.max_seq_len, model.args.max_seq_len if cache is None else cache.max_len)
    stop, rows = frozenset(stop_ids), []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seeds[i] if seeds is not None else params.seed + i)
        rows.append(_Row(i, list(prompt), min(len(prompt) + params.max_new_tokens, context + 1), generator))
    if cache is None:
        cache = model.make_cache(len(rows), min(context, max(row.max_len for row in rows)))
    past = [cache.length] * len(rows)  # how many ids of each row the cache holds
    was_training = model.training
    model.eval()
    try:
        while rows:
            logits = last_logits(model, [row.ids[n:] for row, n in zip(rows, past)], past, cache)
            chosen = draw(process_logits(logits, [row.ids for row in rows], params), [row.generator for row in rows])
            going = []
            for i, (row, token) in enumerate(zip(rows, chosen)):
                if token in stop:
                    continue
                row.ids.append(token)
                yield row.index, token
                if len(row.ids) < row.max_len:
                    going.append(i)
            if 0 < len(going) < len(rows):
                cache.reorder(torch.tensor(going, device=logits.device))
            rows = [rows[i] for i in going]
            past = [len(row.ids) - 1 for row in rows]
    finally:
        model.train(was_training)


@torch.inference_mode()
def last_logits(model: Transformer, feed: Sequence[Sequence[int]], past: Sequence[int], cache: KVCache) -> torch.Tensor:
    """Feed B unequal runs of ids, that of row i from position past[i] on; the logits (B, V) that follow each run.

    An interrupted pass (Ctrl-C) leaves the cache's length as it was, since some layers have stored and others not.
    """
    device = model.model.embed_tokens.weight.device
    width, length = max(map(len, feed)), cache.length
    tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in feed], device=device)  # (B, T)
    positions = torch.tensor(past, device=device)[:, None] + torch.arange(width, device=device)  # (B, T)
    try:
        hidden = model.hidden(tokens, positions=positions, cache=cache)  # (B, T, dim)
    except BaseException:
        cache.truncate(length)
        raise
    last = torch.tensor([len(ids) - 1 for ids in feed], device=device)
    return model.logits(hidden[torch.arange(len(feed), device=device), last])


def check_prompts(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for a prompt that is empty, longer than the context, or holds ids the model does not have."""
    longest, vocab_size = model.args.max_seq_len, model.args.vocab_size
    for i, prompt in enumerate(prompts):
        where = f"prompt {i + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise ValueError(f"{where} is empty; give at least one id, such as the tokenizer's bos")
        if len(prompt) > longest:
            raise ValueError(f"{where} is {len(prompt)} tokens long, the model takes {longest}; shorten it")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(f"{where} holds id {wrong}, the model has 0..{vocab_size - 1}: is this its tokenizer?")


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """What follows each of the prompts (unequal lengths are fine), without the prompt and without the stop id.

    A row's sample depends on its own seed (default: params.seed + row) and not on its neighbours, up to the rounding
    of batched matrix products. Raises ValueError as `check_prompts` does.
    """
    check_prompts(model, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    if prompts:
        for row, token in decode(model, prompts, params, stop_ids, seeds):
            answers[row].append(token)
    return answers


def generate_in_batches(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    batch_size: int = 32,
) -> Iterator[list[int]]:
    """The answers of `generate` to any number of prompts, in their order, with progress on stderr."""
    check_prompts(model, prompts)
    bar = tqdm(total=len(prompts), unit="answer", disable=None)  # None: a bar on a terminal only
    began = told = time.monotonic()
    with bar:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            yield from generate(model, part, params, stop_ids, [params.seed + start + i for i in range(len(part))])
            done, now = start + len(part), time.monotonic()
            bar.update(len(part))
            if bar.disable and now - told > PLAIN_LINE_SECONDS:
                told, rate = now, done / (now - began)
                left = (len(prompts) - done) / rate
                print(f"{done} of {len(prompts)} answers, {rate:.1f}/s, {left:.0f} s left", file=sys.stderr, flush=True)


def stream(
    model: Transformer,
    prompt: Sequence[int],
    params: SamplingParams,
    stop_ids: Collection[int] = (),
    cache: KVCache | None = None,
) -> Iterator[int]:
    """The ids that `generate` gives for one prompt, one by one. A `cache` of one row that holds the first
    `cache.length` ids of the prompt spares feeding them again; afterwards it holds all ids but the last."""
    check_prompts(model, [prompt])
    if cache is not None and cache.length >= len(prompt):
        raise ValueError(f"the cache holds {cache.length} ids, the prompt {len(prompt)}: nothing is left to feed")
    return (token for _, token in decode(model, [prompt], params, stop_ids, cache=cache))


def text_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of a stream of ids, piece by piece, never half a character: bytes wait until theirs is complete."""
    return codecs.iterdecode(map(tokenizer.id_to_bytes, ids), "utf8", errors="replace")


class ChatSession:
    """A conversation that keeps its cache, so that each turn feeds only what is new.

    `messages` is the history; `forgotten` counts the oldest turns that had to go because the context was full.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, template: ChatTemplate, system: str = "") -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.system = [{"role": "system", "content": system}] if system else []
        self.cache = model.make_cache(1)
        self.asked = 0
        self._fed: list[int] = []  # the cache holds the first `cache.length` of these ids
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages: list[dict] = []
        self.forgotten = 0

    def ask(self, text: str, params: SamplingParams) -> Iterator[int]:
        """The ids of the answer, one by one; see `text_pieces`. What was said enters the history, also when the
        iterator is closed early. Every question draws with another seed, so that asking again may give another answer.

        Raises ValueError, and leaves the history as it is, when the question alone does not fit the context.
        """
        messages, forgotten = [*self.messages, {"role": "user", "content": text}], 0
        context = self.model.args.max_seq_len
        room = min(params.max_new_tokens, context // 2)  # for the answer
        prompt, _ = self.template.encode(self.system + messages, add_generation_prompt=True)
        while len(prompt) + room > context and len(messages) > 1:
            messages, forgotten = messages[2:], forgotten + 1  # the oldest question and its answer go
            prompt, _ = self.template.encode(self.system + messages, add_generation_prompt=True)
        check_prompts(self.model, [prompt])
        params = replace(params, seed=params.seed + self.asked)
        self.asked, self.forgotten = self.asked + 1, self.forgotten + forgotten
        return self._answer(messages, prompt, params)

    def _answer(self, messages: list[dict], prompt: list[int], params: SamplingParams) -> Iterator[int]:
        both = zip(self._fed[: self.cache.length], prompt[:-1])  # one id at least is fed: its logits are wanted
        self.cache.truncate(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both)))
        self._fed = list(prompt)
        try:
            for token in stream(self.model, prompt, params, self.template.stop_ids, self.cache):
                self._fed.append(token)
                yield token
        finally:
            answer = self.tokenizer.decode(self._fed[len(prompt) :])
            # A question without any answer would leave two questions in a row, which no template knows.
            self.messages = [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]

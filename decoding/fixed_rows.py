"""The decoding loop of a server: each text has one row of a cache from its beginning to its end.

It does what `Rows` does, and besides:

- texts come and go without a copy of the cache;
- prompts are read in pieces, some ids in each step, so that a long one does not hold up the others;
- a row keeps what it has read when its text has ended: the next text that begins alike reads only the rest.

With the compiled step (cpu_step.py) a text has the same ids and log-probabilities, bit for bit, whatever is decoded
beside it, however its prompt is cut, and whether or not its beginning was kept. Elsewhere they are the same up to the
rounding of batched products.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import torch

from attention.cache import KVCache
from decoding import cpu_step
from decoding.feeder import Feeder, check_prompts, drawable, evaluating
from decoding.params import NEVER, Ids, SamplingParams, Stop, shared_length
from decoding.rows import Token, _Row, choose, score
from decoding.threads import Threads
from model import Transformer

LEAST = 16  # ids of a prompt that are worth a place in a step
MOST_BY_TORCH = 512  # ids of prompts in a step without the compiled one

Adjust = Callable[[torch.Tensor, Ids], torch.Tensor]


class Grown(NamedTuple):
    """What a step added to a text."""

    key: int
    tokens: list[Token]
    """new tokens, also a stop id; before them, with `echo`, those of the prompt (the first has logprob nan)"""
    ended: str | None
    """stop: a stop id or a stop string; length: no more tokens allowed, or the context is full; None: it goes on"""


@dataclass
class _Text(_Row):
    """One text, in row `place` of the cache, which holds its first `fed` ids."""

    place: int = 0
    fed: int = 0
    echo: bool = False
    adjust: Adjust | None = None

    @property
    def answer(self) -> list[int]:
        return self.ids[self.start :]

    def ended(self) -> str | None:
        """Return why the text ends with its last id; see `Grown`."""
        if self.ids[-1] in self.stop.ids or self.stop.ended(self.answer):
            return "stop"
        return "length" if len(self.ids) >= self.max_len else None


class FixedRows:
    """Texts in `n` rows of one cache; `step` reads on in their prompts, and makes those that are read one token longer.

    `free` is the number of rows without a text. `len(rows)` is the number of texts.
    """

    def __init__(self, model: Transformer, n: int, max_len: int | None = None, most: int | None = None) -> None:
        """max_len: room for a text, in tokens (default: the model's context). most: ids of prompts to read in a step
        (default: what suits the model)."""
        self.model, self.n = model, n
        self.cache = model.make_cache(n, max_len)
        if not isinstance(self.cache, KVCache):
            raise ValueError(f"{type(model).__name__} has no key-value cache, which a server needs")
        self.compiled = cpu_step.stepper(model, self.cache)
        self.most = most or (min(128, cpu_step.most_tokens(model)) if self.compiled else MOST_BY_TORCH)
        self._texts: dict[int, _Text] = {}  # by key, in order of arrival
        self._kept: list[list[int]] = [[] for _ in range(n)]  # row i holds these ids, where it has no text
        self._left = [0] * n  # when the last text left row i, as a count of texts
        self._keys = count(1)
        self._threads = Threads()

    @property
    def free(self) -> int:
        return self.n - len(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def bytes(self) -> int:
        """Return the memory of the cache when all rows are full, in bytes."""
        slots = self.cache.capacity / (self.cache.room + self.cache.spare)
        return int(slots * sum(getattr(self.cache, name).nbytes for name in self.cache.stored))

    def add(
        self,
        prompt: Ids,
        params: SamplingParams,
        stop: Stop = NEVER,
        top: int | None = None,
        echo: bool = False,
        adjust: Adjust | None = None,
    ) -> tuple[int, int]:
        """Add a text that follows `prompt`, where a row is free. Return its key, by which `step` and `remove` name it,
        and how many of the prompt's ids were in the cache already.

        top: number of likeliest ids to report with each token; None: its log-probability is not computed either (nan).
        echo: report the tokens of the prompt, too. adjust(logits (V,), answer so far): logits to draw from; what is
        reported is the model's own. Raises ValueError as `check_prompts` does.
        """
        check_prompts(self.model, [prompt], self.cache.max_len)
        place, kept = self._take_place(prompt, 0 if echo else len(prompt) - 1)
        generator = torch.Generator().manual_seed(params.seed)
        max_len = min(len(prompt) + params.max_new_tokens, self.cache.max_len + 1)
        row = (list(prompt), len(prompt), max_len, replace(params, seed=0), generator, stop, top)
        key = next(self._keys)
        self._texts[key] = _Text(key, *row, place, kept, echo, adjust)
        return key, kept

    def remove(self, key: int) -> None:
        """Stop decoding a text. One that has ended already may be removed again."""
        if text := self._texts.pop(key, None):
            self._kept[text.place] = text.ids[: text.fed]
            self._left[text.place] = next(self._keys)

    def step(self) -> list[Grown]:
        """Read and decode on; return what was added to the texts to which something was added. Texts that have ended
        leave."""
        portions = share_out(self._texts.values(), self.most)
        n_ids = sum(n for _, n in portions)
        with self._threads.step(n_ids), evaluating(self.model), torch.inference_mode():
            told, ready, logits = self._read(portions)
            drawn = self._draw(ready, torch.stack(logits)) if ready else []
        for text, token in zip(ready, drawn):
            text.ids.append(token.id)
            told.setdefault(text.key, []).append(token)
        ended = {text.key: text.ended() for text in ready}
        for key in [key for key, why in ended.items() if why]:
            self.remove(key)
        return [Grown(key, tokens, ended.get(key)) for key, tokens in told.items()]

    def _read(
        self, portions: Sequence[tuple[_Text, int]]
    ) -> tuple[dict[int, list[Token]], list[_Text], list[torch.Tensor]]:
        """Feed so many of the next ids of each text. Return the tokens of prompts to report by key, the texts that are
        read to their ends, and the logits (V,) that follow each of these."""
        told, ready, logits = {}, [], []
        together = [(text, n) for text, n in portions if not text.echo or text.fed >= text.start - 1]
        alone = [(text, n) for text, n in portions if text.echo and text.fed < text.start - 1]
        for group in ([together] if together else []) + [[one] for one in alone]:
            n = group[0][1] if group[0] in alone else 1
            out = self._feed(group, n)  # (texts, n, V)
            for (text, read), rows in zip(group, out):
                text.fed += read
                if text.echo and text.fed <= text.start:
                    told[text.key] = self._echoed(text, rows)
                if text.fed == len(text.ids):
                    ready.append(text)
                    logits.append(rows[-1])
        return told, ready, logits

    def _feed(self, portions: Sequence[tuple[_Text, int]], n: int) -> torch.Tensor:
        """Return the logits (texts, n, V) after the last n ids of each portion."""
        runs = [text.ids[text.fed : text.fed + size] for text, size in portions]
        past, places = [text.fed for text, _ in portions], [text.place for text, _ in portions]
        if self.compiled:
            return self.compiled(runs, past, n, places)[..., : drawable(self.model)]
        self.cache.reserve(max(at + len(run) for at, run in zip(past, runs)))
        short = [i for i, run in enumerate(runs) if len(run) == 1]
        found: list[torch.Tensor | None] = [None] * len(runs)
        if short:
            for i, row in zip(short, self._feed_ones([runs[i] for i in short], [places[i] for i in short])):
                found[i] = row
        for i, run in enumerate(runs):
            if found[i] is None:
                found[i] = Feeder(self.model, part_of(self.cache, places[i], places[i] + 1))([run], [past[i]], n)[0]
        return torch.stack(found)

    def _feed_ones(self, runs: Sequence[Ids], places: Sequence[int]) -> torch.Tensor:
        """Feed one id to each of some rows in one pass; return the logits (rows, 1, V). Rows between them that are not
        fed get an id behind what they hold, where the next one overwrites it."""
        first, last = min(places), max(places)
        held = {text.place: text.fed for text in self._texts.values()}
        for place in range(first, last + 1):
            if place not in held:
                del self._kept[place][self.cache.max_len - 1 :]
                held[place] = len(self._kept[place])
        given = dict(zip(places, runs))
        part = part_of(self.cache, first, last + 1)
        rows = range(first, last + 1)
        logits = Feeder(self.model, part)([given.get(row, [0]) for row in rows], [held[row] for row in rows])
        return logits[[place - first for place in places]]

    def _echoed(self, text: _Text, logits: torch.Tensor) -> list[Token]:
        """Return the tokens of a prompt that are known after a portion of it: the first id of all, and those that
        follow its ids, from logits (ids of the portion, V)."""
        after = text.fed - len(logits) + 1
        ids = text.ids[after : min(text.fed + 1, text.start)]
        first = [Token(text.ids[0], math.nan)] if after == 1 else []
        return first + score(logits[: len(ids)], ids, [text.top] * len(ids)) if ids else first

    def _draw(self, texts: list[_Text], logits: torch.Tensor) -> list[Token]:
        """Draw the next token of each text from logits (texts, V)."""
        allowed = logits
        if any(text.adjust for text in texts):
            allowed = torch.stack(
                [text.adjust(row, text.answer) if text.adjust else row for text, row in zip(texts, logits)]
            )
        return score(logits, choose(allowed, texts), [text.top for text in texts])

    def _take_place(self, prompt: Ids, most: int) -> tuple[int, int]:
        """Return the row for a text, and how many of its first ids, `most` at most, are in it: as many as in any row.

        The row that shares most with the text is taken itself if it is free and little of it is lost; else its
        beginning is copied to the row that has been free for longest.
        """
        taken = {text.place: text.ids[: text.fed] for text in self._texts.values()}
        free = sorted((i for i in range(self.n) if i not in taken), key=lambda i: self._left[i])
        if not free:
            raise RuntimeError("every row of the cache has a text")
        held = [taken.get(i, self._kept[i]) for i in range(self.n)]
        shared = [shared_length(prompt[:most], ids) for ids in held]
        source = max(range(self.n), key=lambda i: (shared[i], i in free))
        place = source
        if source not in free or (2 * shared[source] < len(held[source]) and len(free) > 1):
            place = next(i for i in free if i != source)
            for name in self.cache.stored if shared[source] else ():
                tensor = getattr(self.cache, name)  # (n_layers, rows, n_kv_heads, slots, ...)
                tensor[:, place, :, : shared[source]] = tensor[:, source, :, : shared[source]]
        self._kept[place] = []
        return place, shared[source]


def share_out(texts: Iterable[_Text], most: int) -> list[tuple[_Text, int]]:
    """Return how many ids each text feeds in a step: one where one is left, and of longer prompts equal parts of `most`
    ids, but `LEAST` at least; so those that came last may get none."""
    left = [(text, len(text.ids) - text.fed) for text in texts]
    portions = [(text, 1) for text, n in left if n == 1]
    reading = [(text, n) for text, n in left if n > 1]
    rest = max(LEAST, most - len(portions))
    for i, (text, n) in enumerate(reading):
        n = min(n, max(LEAST, rest // (len(reading) - i)), rest)
        if n:
            portions.append((text, n))
        rest -= n
    return portions


def part_of(cache: KVCache, first: int, end: int) -> KVCache:
    """Return a cache of the rows first..end-1, which shares its memory with the whole."""
    part = copy.copy(cache)
    part.length = 0
    for name in part.stored:
        setattr(part, name, getattr(cache, name)[:, first:end])
    return part

"""The interface of all ways to decode: `Sampled` (generate.py), `Beam` (beam.py) and `Speculative` (speculative.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

from attention.cache import KVCache
from cli.progress import track
from decoding.params import NEVER, Ids, SamplingParams, Stop
from model import Transformer


class Decoder(ABC):
    """A way to get the ids of an answer from a model."""

    model: Transformer

    @abstractmethod
    def stream(
        self, prompt: Ids, params: SamplingParams, stop: Stop = NEVER, cache: KVCache | str = "static"
    ) -> Iterator[int]:
        """Return an iterator over the ids that follow one prompt, without the stop id.

        cache: a kind of cache (attention/cache.py), or a cache of one row that holds the first `cache.length` ids of
        the prompt, so that only the rest is fed; afterwards it holds all ids but the last.
        Raises ValueError at once as `check_prompts` does.
        """

    def answers(
        self,
        prompts: Sequence[Ids],
        params: SamplingParams,
        stop: Stop = NEVER,
        cache: str = "static",
        batch_size: int = 32,
    ) -> Iterator[list[int]]:
        """Yield the ids of the answer to each prompt, in order, with progress on stderr; prompt i has seed + i.
        `batch_size` prompts are answered together where this way to decode can do that."""
        for i, prompt in enumerate(track(prompts, "answering", "answers", len(prompts))):
            yield list(self.stream(prompt, replace(params, seed=params.seed + i), stop, cache))

    def report(self) -> str:
        """Return a note on how decoding has gone so far; empty for most ways."""
        return ""

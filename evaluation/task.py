"""What a benchmark is: `Task`, and `TextTask` for those that score the text of an answer by shares of a count."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from decoding.params import SamplingParams
from serving.assistant import Assistant

Example = TypeVar("Example")


@dataclass(frozen=True)
class Share:
    """`count` of `of`; shares of disjoint sets can be added."""

    count: int = 0
    of: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.count + other.count, self.of + other.of)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % score interval (Wilson 1927), which holds for shares near 0 and 1, too; (0, 1) of nothing."""
        if not self.of:
            return 0.0, 1.0
        z, n, p = 1.959964, self.of, self.count / self.of
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

    def __str__(self) -> str:
        low, high = self.interval()
        share = f"{self.count / self.of:6.1%}" if self.of else "     -"
        return f"{share}  ({low:6.1%} to {high:6.1%})  {self.count} of {self.of}"


def total(scores: Iterable[Mapping[str, Share]]) -> dict[str, Share]:
    """Return the sum of the shares of each name."""
    sums: dict[str, Share] = {}
    for score in scores:
        for name, share in score.items():
            sums[name] = sums.get(name, Share()) + share
    return sums


def plain(shares: Mapping[str, Share]) -> dict[str, dict]:
    """Return shares with their intervals as they are written in JSON."""
    return {name: {**vars(share), "interval": share.interval()} for name, share in shares.items()}


class Task(ABC):
    """A benchmark: a dataclass whose fields are settings of eval.py, by name."""

    @abstractmethod
    def run(self, assistant: Assistant) -> dict[str, Any]:
        """Measure the assistant, print the result, and return its numbers."""


@dataclass
class TextTask(Task, Generic[Example]):
    """A benchmark of generated answers: examples, the prompt of each, and the score of an answer."""

    sampling: SamplingParams
    batch_size: int
    output: Path | None

    shots = 0
    """number of solved examples in a prompt"""

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """Yield the examples, in the same order every time."""

    @abstractmethod
    def prompt(self, example: Example) -> list[dict]:
        """Return the messages that ask for an answer."""

    @abstractmethod
    def score(self, example: Example, answer: str) -> dict[str, Share]:
        """Return the shares that an answer contributes to, by name; the sum over all answers is the result."""

    def ask(self, assistant: Assistant, examples: Sequence[Example]) -> list[str]:
        """Return the assistant's answer to each example."""
        if assistant.template is None:
            raise ValueError(f"{assistant.directory} has no chat template (or --raw is true), so it cannot be asked")
        prompts = [assistant.encode(self.prompt(example)) for example in examples]
        return list(assistant.answers(prompts, self.sampling, self.batch_size))

    def about(self, assistant: Assistant, examples: Sequence[Example]) -> dict[str, Any]:
        """Return what a report has to say about its numbers: the model, the settings with the seed, the form of the
        prompts, and the hash of all of them."""
        prompts = [self.prompt(example) for example in examples]
        return {
            "model_directory": str(assistant.directory.resolve()),
            "sampling": vars(self.sampling),
            "shots": self.shots,
            "first_prompt": assistant.tokenizer.decode(assistant.encode(prompts[0]), skip_special=False),
            "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        }

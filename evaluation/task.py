"""What a benchmark is: `Task`, and `TextTask` for those that score the text of an answer."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from decoding.params import SamplingParams
from evaluation.shares import Share
from serving.assistant import Assistant

Example = TypeVar("Example")


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

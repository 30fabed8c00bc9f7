"""Benchmarks where the model chooses the likeliest of several answers, and minimal pairs of sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.benchmark import Benchmark, Item
from evaluation.likelihood import Pair, encode_pair, log_likelihoods
from serving.assistant import Assistant


@dataclass
class ChoiceBenchmark(Benchmark):
    """Take the choice with the highest log-probability after the prompt; of equal ones the first."""

    normalised = True  # also score the choice with the highest log-probability for each of its characters

    def ask(self, assistant: Assistant, items: Sequence[Item]) -> list[dict[str, Any]]:
        shots = [self.fit(assistant, item, max(len(choice.encode()) for choice in item.choices)) for item in items]
        pairs = [
            encode_pair(assistant.tokenizer, item.prompt(n), choice)
            for item, n in zip(items, shots)
            for choice in item.choices
        ]
        self.check_lengths(assistant, items, pairs)
        likelihoods = iter(log_likelihoods(assistant.model, pairs, self.batch_size))
        records = []
        for item, n in zip(items, shots):
            found = [next(likelihoods) for _ in item.choices]
            logprobs = [likelihood.logprob for likelihood in found]
            # a long answer is unlikely because it is long: also by its characters, without the space before it
            by_length = [value / max(1, len(c.removeprefix(" "))) for value, c in zip(logprobs, item.choices)]
            choice, choice_by_length = logprobs.index(max(logprobs)), by_length.index(max(by_length))
            scores = {}
            if item.answer is not None:
                scores = {"accuracy": [float(choice == item.answer), 1]}
                if self.normalised:
                    scores["accuracy_norm"] = [float(choice_by_length == item.answer), 1]
            cut = any(likelihood.cut for likelihood in found)
            records.append({"scores": scores, "choice": choice, "answer": item.answer, "logprobs": logprobs})
            records[-1] |= {"shots": n, "cut": cut}
        return records

    def check_lengths(self, assistant: Assistant, items: Sequence[Item], pairs: Sequence[Pair]) -> None:
        """Raise ValueError for a choice without a token, and for one that is longer than the model's window.

        pairs: those of all choices of all items, in order.
        """
        window = assistant.model.args.max_seq_len
        owners = [item for item in items for _ in item.choices]
        for item, (_, continuation) in zip(owners, pairs):
            if not 0 < len(continuation) <= window:
                raise ValueError(
                    f"{self.data}: a choice of {item.key} has {len(continuation)} tokens; expected 1 to {window}, the "
                    "model's window: remove this row, or measure a model with another window or vocabulary"
                )

"""Benchmarks of generated answers: GSM8K, and the user's own questions with the answers they should have."""

from __future__ import annotations

import dataclasses
import random
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from decoding.params import SamplingParams
from evaluation.benchmark import Benchmark, Item, prompt_ids
from evaluation.text_metrics import bleu, normalize, rouge_l
from serving.assistant import Assistant
from serving.streaming import StopStrings


@dataclass
class AnswerBenchmark(Benchmark):
    """Let the model answer greedily, and score the text."""

    until: ClassVar[tuple[str, ...]] = ()  # texts that end an answer

    @abstractmethod
    def score(self, item: Item, answer: str) -> dict[str, list[float]]:
        """Return the scores of an answer, see evaluation/estimate.py."""

    def encode(self, assistant: Assistant, prompt: str) -> list[int]:
        """Return the ids of a prompt, without a chat template."""
        return prompt_ids(assistant.tokenizer, prompt)

    def ask(self, assistant: Assistant, items: Sequence[Item]) -> list[dict[str, Any]]:
        shots = [self.fit(assistant, item) for item in items]
        prompts = [self.encode(assistant, item.prompt(n)) for item, n in zip(items, shots)]
        # an answer needs its place in the window: the beginning of a longer prompt is left out
        room = max(1, assistant.model.args.max_seq_len - self.new_tokens)
        params = SamplingParams(temperature=0, max_new_tokens=self.new_tokens)
        asked = dataclasses.replace(assistant, stop_strings=StopStrings(assistant.tokenizer, self.until))
        answers = asked.answers([prompt[-room:] for prompt in prompts], params, self.batch_size)
        return [
            {"scores": self.score(item, answer), "answer": answer, "right": item.answer}
            | {"shots": n, "cut": len(prompt) > room}
            for item, n, prompt, answer in zip(items, shots, prompts, answers)
        ]


class GSM8K(AnswerBenchmark):
    """GSM8K (Cobbe et al. 2021): word problems, answered by a number after examples that are solved step by step.

    strict: the number behind "####" is right; flexible: the last number of the answer is.
    """

    name = "gsm8k"
    source = "GSM8K's directory: test.jsonl, and train.jsonl for the shots (github.com/openai/grade-school-math)"
    usual_shots = 5
    new_tokens = 256
    until = ("Question:", "</s>", "<|im_end|>")

    def blocks(self) -> Iterator[list[Item]]:
        """Raises FileNotFoundError where there are no examples to show."""
        folder, test = (self.data.parent, self.data) if self.data.is_file() else (self.data, self.data / "test.jsonl")
        questions = self.pairs(test)
        draw, train = random.Random(1234), []
        if self.n_shots:
            if not (folder / "train.jsonl").is_file():
                raise FileNotFoundError(f"--shots {self.n_shots} needs {folder / 'train.jsonl'}; --shots 0 needs none")
            train = self.pairs(folder / "train.jsonl")
        items = []
        for number, (question, answer) in enumerate(questions):
            # every question has other examples, in the order in which lm-evaluation-harness draws them
            drawn = draw.sample(train, min(len(train), self.n_shots)) if train else []
            shots = tuple(f"Question: {q}\nAnswer: {a}\n\n" for q, a in drawn)
            items.append(Item(f"gsm8k/{number}", "gsm8k", f"Question: {question}\nAnswer:", shots=shots, answer=answer))
        yield items

    def pairs(self, path: Path) -> list[tuple[str, str]]:
        """Return the questions and answers of a file."""
        right = self.read(path, 'texts as "question" and "answer"', has_one_answer)
        return [(record["question"], record["answer"]) for _, record in right]

    def score(self, item: Item, answer: str) -> dict[str, list[float]]:
        right = plain_number(item.answer)
        strict = re.search(r"#### (-?[0-9.,]+)", answer)
        numbers = [match[0] for match in re.finditer(r"-?[$0-9.,]{2,}|-?[0-9]+", answer)]
        found = {"strict": strict[1] if strict else "", "flexible": numbers[-1] if numbers else ""}
        return {name: [float(plain_number(number) == right), 1] for name, number in found.items()}


def answers_of(record: dict) -> list:
    """Return the right answers of a record."""
    answer = record.get("answer")
    return answer if isinstance(answer, list) else [answer]


def has_answer(record: dict) -> bool:
    """Return whether a record has a question and right answers."""
    texts = [record.get("question"), *answers_of(record)]
    return len(texts) > 1 and all(isinstance(text, str) and text for text in texts)


def has_one_answer(record: dict) -> bool:
    """Return whether a record has a question and one right answer, as a text."""
    return has_answer(record) and isinstance(record["answer"], str)


def plain_number(text: str) -> str:
    """Return a number as GSM8K compares it: what stands behind "#### ", without commas, "$" and a point at its end."""
    return re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", text)))


@dataclass
class OwnAnswers(AnswerBenchmark):
    """A file of questions, each with the answer it should have, asked as a conversation where the model has a template.

    exact: the same text but for case, blanks and punctuation. bleu, rouge_l: mean over the answers (text_metrics.py).
    Of several right answers the best score counts.
    """

    sampling: SamplingParams

    name = "answers"
    source = 'a jsonl, json, csv or parquet file of records with "question" and "answer" (a text, or a list of texts)'

    def __post_init__(self) -> None:
        super().__post_init__()
        self.new_tokens = self.sampling.max_new_tokens

    def blocks(self) -> Iterator[list[Item]]:
        subjects: dict[str, list[Item]] = {}
        expected = 'a text as "question", and as "answer" a text or a list of texts'
        for number, record in self.read(self.data, expected, has_answer):
            subject = str(record.get("subject", self.data.stem))
            item = Item(f"{subject}/{number}", subject, record["question"], answer=answers_of(record))
            subjects.setdefault(subject, []).append(item)
        self.check_subjects(subjects)
        yield from (subjects[name] for name in self.subjects or subjects)

    def encode(self, assistant: Assistant, prompt: str) -> list[int]:
        if assistant.template is None:
            return super().encode(assistant, prompt)
        return assistant.encode([{"role": "user", "content": prompt}])

    def score(self, item: Item, answer: str) -> dict[str, list[float]]:
        metrics = {"exact": lambda a, b: float(normalize(a) == normalize(b)), "bleu": bleu, "rouge_l": rouge_l}
        return {name: [max(metric(answer, right) for right in item.answer), 1] for name, metric in metrics.items()}

"""Passkey retrieval (Mohtashami and Jaggi 2023, arXiv:2305.16300): a number hidden in a long text of no meaning.

The text is made up here, in English and Chinese, and needs no data. The number stands at five depths, for lengths from
256 tokens up to the model's window.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evaluation.benchmark import Item
from evaluation.long_context import LongAnswers
from serving.assistant import Assistant

DEPTHS = (0, 25, 50, 75, 100)  # percent of the text before the number
SHORTEST = 256
ITEMS = 2  # of each length and depth: one in English, one in Chinese
ANSWER = 12  # tokens
FILLER = {  # sentences are put together from these parts
    "en": (
        ("A boat", "The wind", "One lamp", "The old road", "A grey bird", "The river"),
        ("crosses the bay", "turns to the north", "waits at the gate", "rests on a stone", "follows the hill"),
        ("in the morning.", "before the rain.", "without a sound.", "for a while.", "as it did last year."),
    ),
    "zh": (
        ("小船", "晚风", "灯火", "旧路", "白鸟", "河水"),
        ("经过桥边", "转向北方", "停在门口", "落在石上", "沿着山坡"),
        ("，天还没有亮。", "，雨还没有来。", "，没有声音。", "，过了一会儿。", "，和去年一样。"),
    ),
}
WORDS = {
    "en": ("Somewhere in the following text stands a pass key. Keep it in mind.\n", " The pass key is {}. Keep {}. "),
    "zh": ("下面的文字里有一个口令，请记住它。\n", "口令是{}。请记住{}。"),
}
QUESTIONS = {"en": "\nWhat is the pass key? The pass key is", "zh": "\n口令是什么？口令是"}


@dataclass
class Passkey(LongAnswers):
    """Count how often the number is found, by length (--subjects 1024 2048; --limit items of each) and by depth."""

    name = "passkey"
    source = "no data, because the text is made up: leave out --data"

    def __post_init__(self) -> None:
        if self.data is not None:
            raise ValueError(f"--task passkey needs {self.source}")
        self.broken, self.n_shots = [], 0

    def run(self, assistant: Assistant) -> dict[str, Any]:
        """Make texts that are as long in the model's own tokens as their names say, then measure."""
        self.tokenizer, self.window = assistant.tokenizer, assistant.model.args.max_seq_len
        return super().run(assistant)

    def blocks(self) -> Iterator[list[Item]]:
        """Raises ValueError for a length that the window does not hold."""
        if not self.subjects:
            lengths = [n for n in (SHORTEST << i for i in range(20)) if n < self.window] + [self.window]
        elif wrong := [name for name in self.subjects if not name.isdecimal() or not 64 <= int(name) <= self.window]:
            raise ValueError(
                f"--subjects {' '.join(wrong)}: expected lengths from 64 to the window of {self.window} tokens"
            )
        else:
            lengths = [int(name) for name in self.subjects]
        for length in lengths:
            yield [
                self.item(length, depth, number, language)
                for number in range(ITEMS)
                for depth in DEPTHS
                for language in [("en", "zh")[number % 2]]
            ]

    def item(self, length: int, depth: int, number: int, language: str) -> Item:
        """Return a text of nearly `length` tokens, with its answer and what a template writes."""
        draw = random.Random(f"{length} {depth} {number}")
        key = str(draw.randint(10_000, 99_999))
        sentences = [self.sentence(draw, language) for _ in range(8)]
        room, empty = length - ANSWER - 8, self.size([], key, depth, language)
        # every measurement reads the whole text: so the number of sentences is computed, then corrected
        each = max(1.0, (self.size(sentences, key, depth, language) - empty) / len(sentences))
        sentences += [self.sentence(draw, language) for _ in range(int((room - empty) / each))]
        while sentences and (over := self.size(sentences, key, depth, language) - room) > 0:
            del sentences[-max(1, int(over / each)) :]
        text = self.text(sentences, key, depth, language)
        return Item(f"{length}/{depth}/{number}", str(length), text, answer=key, category=f"depth {depth} %")

    def sentence(self, draw: random.Random, language: str) -> str:
        """Return a sentence of the filling."""
        return (" " if language == "en" else "").join(draw.choice(part) for part in FILLER[language])

    def text(self, sentences: list[str], key: str, depth: int, language: str) -> str:
        """Return the prompt: the task, the filling with the number at its depth, the question."""
        at, (task, hidden) = round(len(sentences) * depth / 100), WORDS[language]
        space = " " if language == "en" else ""
        before, after = space.join(sentences[:at]), space.join(sentences[at:])
        return task + before + hidden.format(key, key) + after + QUESTIONS[language]

    def size(self, sentences: list[str], key: str, depth: int, language: str) -> int:
        """Return the number of tokens of a prompt."""
        return len(self.tokenizer.encode(self.text(sentences, key, depth, language)))

    def length(self, item: Item) -> int:
        return ANSWER

    def templated(self, item: Item) -> bool:
        return False  # the question is the beginning of its answer

    def score(self, item: Item, answer: str) -> dict[str, list[float]]:
        found = re.search(r"\d+", answer)
        return {"accuracy": [float(found is not None and found[0] == item.answer), 1]}

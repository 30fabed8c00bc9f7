"""Minimal pairs: two sentences of which one is right. They tell small models apart where examinations are chance.

BLiMP (Warstadt et al. 2020) in English, ZhoBLiMP (Liu et al. 2024) in Chinese.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from evaluation.benchmark import Item
from evaluation.choices import ChoiceBenchmark


class MinimalPairs(ChoiceBenchmark):
    """Count how often the good sentence of a pair is the likelier one."""

    @property
    @abstractmethod
    def delimiter(self) -> str:
        """What stands before a sentence, as lm-evaluation-harness has it."""

    def blocks(self) -> Iterator[list[Item]]:
        """Raises ValueError for a paradigm that has no file."""
        paths = [self.data] if self.data.is_file() else sorted(self.data.rglob("*.jsonl"))
        names = [path.stem for path in paths]
        self.check_subjects(names)
        for path in paths:
            if self.subjects and path.stem not in self.subjects:
                continue
            items = []
            for number, record in self.read(path, 'texts as "sentence_good" and "sentence_bad"', has_pair):
                pair = record["sentence_good"], record["sentence_bad"]
                choices = tuple(self.delimiter + sentence for sentence in pair)
                category = str(record.get("linguistics_term") or record.get("phenomenon") or "")
                key = f"{path.stem}/{number}"
                items.append(Item(key, path.stem, "", choices=choices, answer=0, category=category))
            yield items


def has_pair(record: dict) -> bool:
    """Return whether a record has two sentences."""
    pair = (record.get(key) for key in ("sentence_good", "sentence_bad"))
    return all(isinstance(sentence, str) and sentence for sentence in pair)


class BLiMP(MinimalPairs):
    """BLiMP: 67 paradigms of English grammar."""

    name = "blimp"
    source = "BLiMP's data/ directory: PARADIGM.jsonl (github.com/alexwarstadt/blimp)"
    delimiter = " "


class ZhoBLiMP(MinimalPairs):
    """ZhoBLiMP: 118 paradigms of Chinese grammar."""

    name = "zhoblimp"
    source = "ZhoBLiMP's unpacked archive: PARADIGM.jsonl (github.com/sjtu-compling/ZhoBLiMP)"
    delimiter = ""

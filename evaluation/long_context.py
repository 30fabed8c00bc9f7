"""Answers to long prompts: what they have in common, LongBench with LongBench-E, and LongEval.

A prompt that does not fit the model's window loses its middle, as LongBench publishes it, because instructions stand at
both ends; or its beginning, as lm-evaluation-harness cuts it (--cut left).
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cli.extras import need
from cli.progress import say
from decoding.params import SamplingParams
from evaluation import long_metrics as metrics
from evaluation.benchmark import Benchmark, Item, plain, prompt_ids, summarize
from evaluation.estimate import estimates
from serving.assistant import Assistant

SHOWN = 1000  # characters of each end of the first prompt in a report


@dataclass
class LongAnswers(Benchmark):
    """Let the model answer long prompts greedily, and score the text."""

    cut: Literal["middle", "left"]

    @property
    def lost(self) -> str:
        """What a prompt loses that does not fit."""
        return "the middle" if self.cut == "middle" else "the beginning"

    @abstractmethod
    def length(self, item: Item) -> int:
        """Return the largest number of tokens of an answer."""

    @abstractmethod
    def score(self, item: Item, answer: str) -> dict[str, list[float]]:
        """Return the scores of an answer, see evaluation/estimate.py."""

    def templated(self, item: Item) -> bool:
        """Return whether the prompt is asked as a conversation, where the model has a template."""
        return True

    def about(self, assistant: Assistant, blocks: list[list[Item]]) -> dict[str, Any]:
        """Return what a report has to say, of the first prompt its two ends only."""
        found = super().about(assistant, blocks)
        if len(text := found["first_prompt"]) > 2 * SHOWN:
            found["first_prompt"] = f"{text[:SHOWN]} [...] {text[-SHOWN:]}"
        return found

    def check(self, assistant: Assistant) -> Assistant:
        """Raise ValueError for a window in which nothing long fits."""
        window = assistant.model.args.max_seq_len
        if window < 64:
            raise ValueError(
                f"{assistant.directory} has a window of {window} tokens: --task {self.name} needs 64 or more"
            )
        return assistant

    def ask(self, assistant: Assistant, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the records; each has the tokens of its prompt, and whether that was cut."""
        window = assistant.model.args.max_seq_len
        # an answer takes at most half of a short window
        lengths = [min(self.length(item), window // 2) for item in items]
        prompts = [self.encode(assistant, item, window - n) for item, n in zip(items, lengths)]
        answers = [""] * len(items)
        for n in sorted(set(lengths)):
            members = [i for i, length in enumerate(lengths) if length == n]
            params = SamplingParams(temperature=0, max_new_tokens=n)
            asked = assistant.answers([prompts[i][0] for i in members], params, self.batch_size)
            for i, answer in zip(members, asked):
                answers[i] = answer
        return [
            {"scores": self.score(item, answer), "answer": answer, "right": self.right(item)}
            | {"tokens": len(ids), "cut": is_cut, "shorter_answer": n < self.length(item)}
            for item, answer, (ids, is_cut), n in zip(items, answers, prompts, lengths)
        ]

    def right(self, item: Item) -> Any:
        """Return the right answers for the record of an item."""
        return item.answer

    def encode(self, assistant: Assistant, item: Item, room: int) -> tuple[list[int], bool]:
        """Return the ids of a prompt, at most `room`, and whether it had to be cut."""
        tokenizer = assistant.tokenizer
        templated = assistant.template is not None and self.templated(item)

        def whole(text: str) -> list[int]:
            return assistant.encode([{"role": "user", "content": text}]) if templated else prompt_ids(tokenizer, text)

        ids = whole(item.question)
        if len(ids) <= room:
            return ids, False
        if self.cut == "left":
            return ids[-room:], True
        text = tokenizer.encode(item.question)
        left = room - (len(ids) - len(text))  # beside what the template writes
        while left > 1:  # the halves may be encoded into more ids together than each for itself
            half = left // 2
            ids = whole(tokenizer.decode(text[:half]) + tokenizer.decode(text[-half:]))
            if len(ids) <= room:
                return ids, True
            left -= max(2, len(ids) - room)
        return ids[-room:], True

    def run(self, assistant: Assistant) -> dict[str, Any]:
        result = super().run(assistant)
        path = self.report_path(assistant).with_suffix(".items.jsonl")
        shorter = sum(json.loads(line).get("shorter_answer", False) for line in path.open(encoding="utf8"))
        if shorter:
            half = assistant.model.args.max_seq_len // 2
            say(f"{shorter} answers had at most {half} tokens, half of the model's window, and fewer than published")
        return result | {"shorter_answers": shorter}


# ---- LongBench

SETS: dict[str, tuple[str, metrics.Metric]] = {  # set -> language, score
    **{name: ("en", metrics.qa_f1) for name in ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa")},
    **{name: ("en", metrics.qa_f1) for name in ("musique", "triviaqa")},
    **{name: ("en", metrics.rouge) for name in ("gov_report", "qmsum", "multi_news", "samsum")},
    "trec": ("en", metrics.classification),
    "passage_count": ("en", metrics.count),
    "passage_retrieval_en": ("en", metrics.retrieval),
    "multifieldqa_zh": ("zh", metrics.qa_f1_zh),
    **{name: ("zh", metrics.rouge_zh) for name in ("dureader", "vcsum")},
    "lsht": ("zh", metrics.classification),
    "passage_retrieval_zh": ("zh", metrics.retrieval_zh),
    **{name: ("code", metrics.code_similarity) for name in ("lcc", "repobench-p")},
}
WITHOUT_TEMPLATE = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # they continue examples or code
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # what follows the first line of an answer does not count
SETS_E = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
BUCKETS = ((4000, "0-4k"), (8000, "4-8k"), (float("inf"), "8k+"))  # by the number of words that the data name


class LongBench(LongAnswers):
    """LongBench (Bai et al. 2023): 21 sets in English, Chinese and code; by language. The prompts are read from the
    files that its repository publishes."""

    name = "longbench"
    source = (
        "LongBench's directory: SET.jsonl (or data/SET.jsonl), and dataset2prompt.json with dataset2maxlen.json (or "
        "config/...; data: huggingface.co/datasets/THUDM/LongBench, config: github.com/THUDM/LongBench)"
    )
    sets: ClassVar[Sequence[str]] = tuple(SETS)
    suffix: ClassVar[str] = ""

    def blocks(self) -> Iterator[list[Item]]:
        """Raises FileNotFoundError where prompts or a set of --subjects are missing, ValueError for an unknown set."""
        self.check_subjects(self.sets)
        self.prompts, self.lengths = self.config("dataset2prompt.json"), self.config("dataset2maxlen.json")
        for name in self.subjects or self.sets:
            path = self.find(f"{name}{self.suffix}.jsonl")
            if path is None:
                if self.subjects:
                    raise FileNotFoundError(f"{self.data} has no {name}{self.suffix}.jsonl; expected {self.source}")
                continue
            if SETS[name][1] in (metrics.qa_f1_zh, metrics.rouge_zh):
                need(f"--task {self.name} with {name}", "eval", "jieba")
            expected = '"input", "context" and "answers" (a list of texts)'
            rows = self.read(path, expected, has_answers)
            yield [self.item(name, number, record) for number, record in rows]

    def find(self, name: str) -> Path | None:
        """Return the file of a name in the data, or in the folders that are published; None where there is none."""
        places = (self.data, self.data / "data", self.data / "config", self.data / "LongBench" / "config")
        return next((place / name for place in places if (place / name).is_file()), None)

    def config(self, name: str) -> dict[str, Any]:
        """Return a file of the repository: set -> value. Raises ValueError where it is none."""
        path = self.find(name)
        if path is None:
            raise FileNotFoundError(f"{self.data} has no {name}; expected {self.source}")
        try:
            values = json.loads(path.read_text(encoding="utf8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} should hold an object (set -> value), found {type(values).__name__}")
        return values

    def item(self, name: str, number: int, record: dict[str, Any]) -> Item:
        """Return the item of a record: its place in the prompt is {context} and {input}."""
        if name not in self.prompts or name not in self.lengths:
            raise ValueError(f"the prompts in {self.data} lack {name}: expected dataset2prompt.json of LongBench")
        text = self.prompts[name]
        for key in ("context", "input"):  # no str.format: a prompt may hold other braces
            text = text.replace("{" + key + "}", f"\x00{key}\x00")
        for key in ("context", "input"):
            text = text.replace(f"\x00{key}\x00", record[key])
        answer = {"texts": record["answers"], "classes": record.get("all_classes") or []}
        return Item(f"{name}/{number}", name, text, answer=answer, category=self.category(name, record))

    def category(self, name: str, record: dict[str, Any]) -> str:
        """Return the language of a set."""
        return SETS[name][0]

    def length(self, item: Item) -> int:
        return int(self.lengths[item.subject])

    def templated(self, item: Item) -> bool:
        return item.subject not in WITHOUT_TEMPLATE

    def right(self, item: Item) -> Any:
        return item.answer["texts"]

    def score(self, item: Item, answer: str) -> dict[str, list[float]]:
        metric, right = SETS[item.subject][1], item.answer
        value = metrics.best(metric, answer, right["texts"], right["classes"], item.subject in FIRST_LINE)
        return {metric.__name__: [value, 1], "score": [value, 1]}


class LongBenchE(LongBench):
    """LongBench-E: 13 of the sets with equal numbers of short, middle and long texts; by length."""

    name = "longbench_e"
    source = LongBench.source.replace("SET.jsonl", "SET_e.jsonl")
    sets = SETS_E
    suffix = "_e"

    def category(self, name: str, record: dict[str, Any]) -> str:
        length = record.get("length")
        return next(words for most, words in BUCKETS if not isinstance(length, (int, float)) or length < most)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the estimates, and those of each set by length, as the published table has them."""
        groups: dict[str, list[dict]] = {}
        for record in records:
            groups.setdefault(f"{record['subject']} {record['category']}", []).append(record["scores"])
        return summarize(records) | {"by_subject_and_category": {k: plain(estimates(v)) for k, v in groups.items()}}


def has_answers(record: dict) -> bool:
    """Return whether a record of LongBench has what an item needs."""
    answers = record.get("answers")
    texts = isinstance(record.get("context"), str) and isinstance(record.get("input"), str)
    return texts and isinstance(answers, list) and bool(answers) and all(isinstance(each, str) for each in answers)


# ---- LongEval


class LongEval(LongAnswers):
    """LongEval (Li et al. 2023): the number in one line of many (lines), the first topic of a conversation (topics).

    lines: the last whole number of the answer is right, as published. topics: the answer names the topic; there the
    published judge is GPT-3.5, here it is a comparison of the texts.
    """

    name = "longeval"
    source = (
        "LongEval's evaluation/ directory: lines/testcases/N_lines.jsonl, topics/testcases/N_topics.jsonl "
        "(github.com/DachengLi1/LongChat, longeval/)"
    )
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"(\d+)_(lines|topics)\.jsonl")

    def blocks(self) -> Iterator[list[Item]]:
        """Raises ValueError for a file of --subjects that is not there."""
        paths = [self.data] if self.data.is_file() else sorted(self.data.rglob("*.jsonl"))
        named = {f"{m[2]}_{m[1]}": path for path in paths if (m := self.pattern.fullmatch(path.name))}
        order = sorted(named, key=lambda name: (name.split("_")[0], int(name.split("_")[1])))
        self.check_subjects(order)
        for name in order:
            if self.subjects and name not in self.subjects:
                continue
            kind = name.split("_")[0]
            expected = 'a text as "prompt", and ' + ('"expected_number"' if kind == "lines" else 'a list "topics"')
            rows = self.read(named[name], expected, has_number if kind == "lines" else has_topics)
            key = "expected_number" if kind == "lines" else "topics"
            yield [
                Item(f"{name}/{number}", name, record["prompt"], answer=record[key], category=kind)
                for number, record in rows
            ]

    def length(self, item: Item) -> int:
        return 100 if item.category == "lines" else 50

    def right(self, item: Item) -> Any:
        return item.answer if item.category == "lines" else item.answer[0]

    def score(self, item: Item, answer: str) -> dict[str, list[float]]:
        if item.category == "lines":
            numbers = re.findall(r"\d+", answer)
            return {"accuracy": [float(bool(numbers) and int(numbers[-1][-300:]) == item.answer), 1]}
        topic, said = (" ".join(metrics.english_words(text)) for text in (item.answer[0], answer))
        return {"accuracy": [float(topic in said), 1]}


def has_number(record: dict) -> bool:
    """Return whether a record is one of LongEval's lines."""
    return isinstance(record.get("prompt"), str) and isinstance(record.get("expected_number"), int)


def has_topics(record: dict) -> bool:
    """Return whether a record is one of LongEval's topics."""
    topics = record.get("topics")
    named = isinstance(topics, list) and topics and all(isinstance(each, str) for each in topics)
    return isinstance(record.get("prompt"), str) and bool(named)

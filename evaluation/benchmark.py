"""What published benchmarks have in common: items by subject, solved examples before them, results item by item.

A subclass says where its items come from (`blocks`) and how an item is answered and scored (`ask`). Results are written
as they come, a line of JSON for each item, and a second call goes on behind the last of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from cli.progress import Progress, say
from corpora.files import bad, records
from corpora.registry import BadRecord
from evaluation.estimate import Estimate, difference, estimates
from evaluation.task import Task
from files import json_line
from serving.answer_file import begin, file_times, keep_aside
from serving.assistant import Assistant, first_id
from tokenizer import Tokenizer

BATCHES = 8  # batches of items between two writes


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    key: str  # unique, such as "logic/3"
    subject: str
    question: str  # the text that the answer follows
    description: str = ""  # first lines of the prompt
    shots: tuple[str, ...] = ()  # solved examples, each with the blank line behind it
    choices: tuple[str, ...] = ()  # possible answers as they continue the question
    answer: Any = None  # number of the right choice, or the right texts; None: it is not published
    category: str = ""

    def prompt(self, shots: int) -> str:
        """Return the description, the first solved examples and the question."""
        return self.description + "".join(self.shots[:shots]) + self.question


@dataclass
class Benchmark(Task):
    """A benchmark of items. `name` is its value of --task, `source` where its data are published."""

    data: Path | None
    shots: int | None
    subjects: tuple[str, ...]
    limit: int | None
    batch_size: int
    output: Path | None

    name: ClassVar[str]
    source: ClassVar[str]
    usual_shots: ClassVar[int] = 0
    new_tokens: ClassVar[int] = 1  # tokens of the context that an answer needs
    lost = "the beginning"  # of a prompt that does not fit

    def __post_init__(self) -> None:
        """Raise FileNotFoundError where there are no data."""
        self.broken: list[BadRecord] = []  # rows that could not be read
        self.n_shots = self.usual_shots if self.shots is None else self.shots
        if self.data is None or not self.data.exists():
            found = "none was given" if self.data is None else f"{self.data} does not exist"
            raise FileNotFoundError(f"--task {self.name} needs --data, and {found}; expected {self.source}")

    @abstractmethod
    def blocks(self) -> Iterator[list[Item]]:
        """Yield the items in the same order every time, in lists of those that begin alike."""

    @abstractmethod
    def ask(self, assistant: Assistant, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return a record of each item: its "scores" (see evaluation/estimate.py), and what the model answered."""

    def check(self, assistant: Assistant) -> Assistant:
        """Return the assistant as this benchmark asks it."""
        return assistant

    def chosen(self) -> list[list[Item]]:
        """Return the blocks of --subjects, each with its first --limit items.

        Raises ValueError where no item is left.
        """
        blocks = [list(islice(block, self.limit)) for block in self.blocks()]
        blocks = [block for block in blocks if block]
        if not blocks and self.broken:
            first, rows = self.broken[0], f"{len(self.broken)} row" + "s" * (len(self.broken) > 1)
            raise ValueError(
                f"{self.data} has no items: none of its {rows} can be read. The first, {first.where}: {first.reason}. "
                f"Expected {self.source}"
            )
        if not blocks:
            raise ValueError(f"{self.data} has no items: expected {self.source}")
        return blocks

    def run(self, assistant: Assistant) -> dict[str, Any]:
        """Ask all items, print the scores, write the report; return it."""
        blocks, assistant = self.chosen(), self.check(assistant)
        report = self.report_path(assistant)
        records = self.records(assistant, blocks, report.with_suffix(".items.jsonl"))
        result = self.about(assistant, blocks) | self.summary(records)
        fewer = sum(record.get("shots", self.n_shots) < self.n_shots for record in records)
        cut = sum(record.get("cut", False) for record in records)
        if fewer or cut:
            window = f"the model's window of {assistant.model.args.max_seq_len} tokens"
            say(f"{window} took fewer shots for {fewer} items, and lacks {self.lost} of {cut}")
        result |= {"fewer_shots": fewer, "cut": cut, "bad_rows": len(self.broken)}
        report.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf8")
        origin = self.data or "texts made up"
        print(f"{self.name}, {self.n_shots} shots, {len(records)} items of {origin}\n{table(result)}\n")
        print(f"all numbers: {report}; item by item: {report.with_suffix('.items.jsonl')}")
        keep_aside(self.broken, report.with_suffix(".bad.jsonl"))
        return result

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the estimates of all records and of their groups."""
        return summarize(records)

    def report_path(self, assistant: Assistant) -> Path:
        """Return where the report goes: --output, else beside the model."""
        return self.output or assistant.directory.parent / f"{assistant.directory.name}.{self.name}.json"

    def records(self, assistant: Assistant, blocks: list[list[Item]], path: Path) -> list[dict[str, Any]]:
        """Return the records of all items; `path` gets each as a line, and may hold the first ones already."""
        begun = path.with_suffix(".begun.json")
        items = [item for block in blocks for item in block]
        done = begin(path, begun, self.about(assistant, blocks))
        if done:
            say(f"{path} has {done} of {len(items)} items already: going on behind them")
        records = [json.loads(line) for line in path.open(encoding="utf8")]
        todo, skip = [], done
        for block in blocks:
            todo.append(block[skip:])
            skip = max(0, skip - len(block))
        size = BATCHES * self.batch_size
        parts = [block[at : at + size] for block in todo for at in range(0, len(block), size)]
        with path.open("ab") as file, Progress(self.name, "items", len(items), done) as progress:
            for part in parts:
                for item, record in zip(part, self.ask(assistant, part)):
                    names = {"item": item.key, "subject": item.subject, "category": item.category}
                    records.append(names | record)
                    file.write(json_line(records[-1]))
                file.flush()
                progress.add(len(part))
        begun.unlink()
        return records

    def about(self, assistant: Assistant, blocks: list[list[Item]]) -> dict[str, Any]:
        """Return what a report has to say about its numbers: model, shots, prompts, and the hash of the data."""
        items = [item for block in blocks for item in block]
        data = json.dumps([[*vars(item).values()] for item in items]).encode()
        settings = {
            field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self) if field.name != "output"
        }
        return {
            "task": self.name,
            "model_directory": str(assistant.directory.resolve()),
            "model_files": file_times(assistant.directory),
            "dtype": str(assistant.model.dtype),
            "window": assistant.model.args.max_seq_len,
            "settings": settings,
            "shots": self.n_shots,
            "first_prompt": items[0].prompt(self.n_shots),
            "items_sha256": hashlib.sha256(data).hexdigest(),
        }

    def fit(self, assistant: Assistant, item: Item, longest: int = 0) -> int:
        """Return with how many shots a prompt fits the model's window beside an answer of `longest` bytes."""
        room = assistant.model.args.max_seq_len - self.new_tokens
        for shots in range(min(self.n_shots, len(item.shots)), 0, -1):
            if len(assistant.tokenizer.encode(item.prompt(shots))) + longest < room:
                return shots
        return 0

    def read(self, path: Path, expected: str, is_right: Callable[[dict], bool]) -> Iterator[tuple[int, dict]]:
        """Yield the records of a file with their numbers; those that are not `expected` go to `broken`.

        Raises FileNotFoundError for a folder, and where there is no file.
        """
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"--task {self.name}: {path} {found}; expected {self.source}")
        for number, record in enumerate(records(path)):
            if isinstance(record, BadRecord):
                self.broken.append(record)
            elif isinstance(record.value, dict) and is_right(record.value):
                yield number, record.value
            else:
                self.refuse(record.where, f"expected {expected}", record.value)

    def refuse(self, where: str, reason: str, value: Any) -> None:
        """Count a row as one that could not be read."""
        self.broken.append(bad(where, reason, json.dumps(value, ensure_ascii=False, default=str)))

    def check_subjects(self, known: Collection[str]) -> None:
        """Raise ValueError for a name of --subjects that is not known."""
        if unknown := [name for name in self.subjects if name not in known]:
            raise ValueError(f"--subjects {' '.join(unknown)}: expected names among {', '.join(known)}")


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the estimates over all items, by category and by subject, and the plain mean over the subjects."""
    summary: dict[str, Any] = {"all": plain(estimates([record["scores"] for record in records]))}
    for key, name in (("category", "by_category"), ("subject", "by_subject")):
        groups: dict[str, list[dict]] = {}
        for record in records:
            groups.setdefault(record[key], []).append(record["scores"])
        if len(groups) > 1:
            summary[name] = {group: plain(estimates(scores)) for group, scores in groups.items()}
    subjects = summary.get("by_subject", {}).values()
    summary["mean_of_subjects"] = {
        name: sum(subject[name]["value"] for subject in subjects) / len(subjects)
        for name in summary["all"]
        if subjects and all(name in subject for subject in subjects)
    }
    return summary


def plain(values: dict[str, Estimate]) -> dict[str, dict]:
    """Return estimates as they are written in JSON."""
    return {name: vars(value) for name, value in values.items()}


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt without a chat template, never none: the text as it is, behind bos where the tokenizer
    puts one. lm-evaluation-harness asks the same ids. `Assistant.encode_text`, which is for texts to continue, puts eos
    before those of our own vocabularies."""
    return [*tokenizer.begins, *tokenizer.encode(text)] or [first_id(tokenizer)]


def table(result: dict[str, Any]) -> str:
    """Return the scores of all items and of each category as lines of text; subjects where there are no categories."""
    groups = {"all items": result["all"]} | result.get("by_category", result.get("by_subject", {}))
    lines = []
    for group, scores in groups.items():
        for name, score in scores.items():
            value = Estimate(**{key: math.inf if number is None else number for key, number in score.items()})
            lines.append(f"  {group:<24}{name:<16}{value}  {value.items} items")
    if mean := result.get("mean_of_subjects"):
        lines += [f"  {'mean of subjects':<24}{name:<16}{value:8.4f}" for name, value in mean.items()]
    return "\n".join(lines)


def compare_models(task: Benchmark, assistants: Sequence[Assistant]) -> dict[str, Any]:
    """Measure two assistants on the same items; return both reports and the differences, first minus second."""
    first = task.report_path(assistants[0])
    # with --output, the second report stands beside the first one
    second = first.with_suffix(".against.json") if task.output else task.report_path(assistants[1])
    if first == second:
        raise ValueError(f"--against is the model itself: both reports would be {first}")
    results = [
        dataclasses.replace(task, output=path).run(assistant) for path, assistant in zip((first, second), assistants)
    ]
    print(f"{assistants[0].directory} minus {assistants[1].directory}")
    difference = compare(*(path.with_suffix(".items.jsonl") for path in (first, second)))
    return {"model": results[0], "against": results[1], "difference": plain(difference)}


def compare(ours: Path, theirs: Path) -> dict[str, Estimate]:
    """Return the difference of two models on the items that both files (`X.items.jsonl`) hold; print it.

    Raises ValueError where no item is in both.
    """
    read = [{r["item"]: r["scores"] for r in map(json.loads, path.open(encoding="utf8"))} for path in (ours, theirs)]
    common = [key for key in read[0] if key in read[1]]
    if not common:
        raise ValueError(f"{ours} and {theirs} have no item in common: were both made with the same --data?")
    names = dict.fromkeys(name for key in common for name in read[0][key] if name in read[1][key])
    result = {}
    for name in names:
        both = [(read[0][key][name], read[1][key][name]) for key in common if name in read[1][key]]
        result[name] = difference(*zip(*both))
        verdict = "no clear difference" if result[name].low <= 0 <= result[name].high else "a clear difference"
        print(f"  {name:<16}{result[name]}  on {len(both)} common items: {verdict}")
    return result

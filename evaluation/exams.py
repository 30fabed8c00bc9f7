"""Multiple-choice examinations by subject: C-Eval, CMMLU, ACLUE, MMLU, and a file of the user's own questions.

Prompts are those of lm-evaluation-harness 0.4.13, so that the same items have the same answers there.
"""

from __future__ import annotations

import csv
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from evaluation.benchmark import Item
from evaluation.choices import ChoiceBenchmark
from evaluation.exam_subjects import ACLUE, CEVAL, CMMLU, MMLU, Subject
from serving.assistant import Assistant

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """A question with its options."""

    id: str
    text: str
    options: tuple[str, ...]
    answer: int | None  # number of the right option; None: it is not published


@dataclass
class Exam(ChoiceBenchmark):
    """Questions with lettered options (`--form letters`: the model names the letter) or without (`--form answers`: it
    says the whole answer), after solved examples."""

    form: str

    cue: ClassVar[str] = "答案："  # the line that the answer follows
    usual_shots = 5

    @property
    def normalised(self) -> bool:
        """Return whether choices differ in length: letters do not."""
        return self.form == "answers"

    def item(self, subject: str, title: Subject, question: Question, shots: Sequence[Question]) -> Item:
        """Return a question as it is asked."""
        options = LETTERS[: len(question.options)] if self.form == "letters" else question.options
        return Item(
            key=f"{subject}/{question.id}",
            subject=subject,
            question=self.body(question),
            description=self.description(title.title),
            shots=tuple(f"{self.body(shot)} {self.solution(shot)}\n\n" for shot in shots),
            choices=tuple(f" {option}" for option in options),
            answer=question.answer,
            category=title.category,
        )

    def body(self, question: Question) -> str:
        """Return the text that the answer follows."""
        lines = [question.text.strip()]
        if self.form == "letters":
            lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options)]
        return "\n".join([*lines, self.cue])

    def solution(self, question: Question) -> str:
        """Return the right answer of a solved example."""
        return LETTERS[question.answer] if self.form == "letters" else question.options[question.answer]

    @abstractmethod
    def description(self, title: str) -> str:
        """Return the first lines of a prompt about a subject."""


@dataclass
class PublishedExam(Exam):
    """An examination with a file for each subject below dev/ (solved examples), val/ and test/."""

    split: str | None

    table: ClassVar[Mapping[str, Subject]]
    usual_split: ClassVar[str] = "test"

    def blocks(self) -> Iterator[list[Item]]:
        """Raises ValueError for a subject that does not exist, FileNotFoundError where none has a file."""
        self.check_subjects(self.table)
        split = self.split or self.usual_split
        paths = {name: self.path(name, split) for name in self.subjects or self.table}
        if missing := [name for name, path in paths.items() if path is None]:
            which = f"--subjects {' '.join(missing)}" if self.subjects else "any subject"
            if self.subjects or len(missing) == len(paths):
                raise FileNotFoundError(f"{self.data / split} has no file of {which}; expected {self.source}")
        for name, path in paths.items():
            if path is None:
                continue
            shots = []
            if self.n_shots:
                shots_path = self.path(name, "dev")
                if shots_path is None:
                    raise FileNotFoundError(f"{self.data / 'dev'} has no file of {name} for --shots {self.n_shots}")
                shots = [question for question in self.read_table(shots_path) if question.answer is not None]
            yield [
                self.item(name, self.table[name], question, shots[: self.n_shots]) for question in self.read_table(path)
            ]

    def path(self, subject: str, split: str) -> Path | None:
        """Return the file of a subject; None where there is none."""
        # ACLUE's files are called by the names in the prompts
        names = (f"{subject}_{split}.csv", f"{subject}.csv", f"{self.table[subject].title}.csv")
        return next((path for name in names if (path := self.data / split / name).is_file()), None)

    def read_table(self, path: Path) -> list[Question]:
        """Return the questions of a csv file with or without a first line of names; bad rows go to `broken`."""
        # utf-8-sig: files that were saved by Excel begin with a mark
        with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
            rows = list(csv.reader(file))
        names = ["question", *LETTERS[:4].lower(), "answer"]
        first, line = [cell.strip().lower() for cell in rows[0]] if rows else [], 1
        if "question" in first:
            names, rows, line = first, rows[1:], 2
        needed = 1 + max((i for i, name in enumerate(names) if name in (*LETTERS.lower(), "answer")), default=0)
        questions = []
        for number, row in enumerate(rows):
            try:
                if len(row) < needed:  # else a row that breaks off would be a question without an answer
                    raise ValueError(f"expected at least {needed} cells, found {len(row)}")
                questions.append(read_question(dict(zip(names, row)), str(number)))
            except ValueError as error:
                self.refuse(f"{path}:{number + line}", str(error), row)
        return questions


class CEval(PublishedExam):
    """C-Eval (Huang et al. 2023): 52 subjects in Chinese. Answers of its test split are not published."""

    name = "ceval"
    source = (
        "C-Eval's exam/ directory: dev/, val/ and test/ with SUBJECT_val.csv (huggingface.co/datasets/ceval/ceval-exam)"
    )
    table = CEVAL
    usual_split = "val"

    def description(self, title: str) -> str:
        return f"以下是中国关于{title}的单项选择题，请选出其中的正确答案。\n\n"

    def run(self, assistant: Assistant) -> dict[str, Any]:
        """Measure; for the test split also write the file that C-Eval's site takes: subject -> id -> letter."""
        result = super().run(assistant)
        if self.split == "test":
            report = self.report_path(assistant)
            letters: dict[str, dict[str, str]] = {}
            for line in report.with_suffix(".items.jsonl").open(encoding="utf8"):
                record = json.loads(line)
                subject, _, number = record["item"].partition("/")
                letters.setdefault(subject, {})[number] = LETTERS[record["choice"]]
            path = report.with_suffix(".submission.json")
            path.write_text(json.dumps(letters, indent=1) + "\n", encoding="utf8")
            print(f"for C-Eval's site: {path}")
        return result


class CMMLUExam(PublishedExam):
    """CMMLU (Li et al. 2023): 67 subjects in Chinese."""

    name = "cmmlu"
    source = "CMMLU's data/ directory: dev/ and test/ with SUBJECT.csv (github.com/haonan-li/CMMLU)"
    table = CMMLU

    def description(self, title: str) -> str:
        return f"以下是关于{title}的单项选择题，请直接给出正确答案的选项。\n\n"


class ACLUEExam(CMMLUExam):
    """ACLUE (Zhang and Li 2023): 15 tasks in ancient Chinese."""

    name = "aclue"
    source = "ACLUE's data/ directory: dev/ and test/ with TASK.csv (github.com/isen-zhang/ACLUE)"
    table = ACLUE


class MMLUExam(PublishedExam):
    """MMLU (Hendrycks et al. 2021): 57 subjects in English."""

    name = "mmlu"
    source = "MMLU's data/ directory: dev/, val/ and test/ with SUBJECT_test.csv (github.com/hendrycks/test)"
    table = MMLU
    cue = "Answer:"

    def description(self, title: str) -> str:
        return f"The following are multiple choice questions (with answers) about {title}.\n\n"


class OwnQuestions(Exam):
    """A file of the user's own: records with "question", "A", "B", ... or "choices", "answer", and perhaps "subject".

    The first --shots records of a subject that have an answer are its solved examples, and are not asked.
    """

    name = "choices"
    source = 'a csv, jsonl, json or parquet file of records with "question", "A", "B", ... and "answer" (a letter)'
    usual_shots = 0

    def blocks(self) -> Iterator[list[Item]]:
        subjects: dict[str, list[Question]] = {}
        ids = set()  # subject and id of each question: --against pairs the answers of two models by them
        for number, record in self.read(self.data, "an object", bool):
            subject = str(record.get("subject", self.data.stem))
            try:
                question = read_question(record, str(number))
                if (subject, question.id) in ids:
                    raise ValueError(f"another question of its subject has the id {question.id!r}")
            except ValueError as error:
                self.refuse(f"{self.data}, record {number + 1}", str(error), record)
                continue
            ids.add((subject, question.id))
            subjects.setdefault(subject, []).append(question)
        self.check_subjects(subjects)
        blocks = []
        for subject in self.subjects or subjects:
            shots = [question for question in subjects[subject] if question.answer is not None][: self.n_shots]
            questions = [question for question in subjects[subject] if question not in shots]
            blocks.append([self.item(subject, Subject(subject, ""), question, shots) for question in questions])
        if blocks and not any(blocks):
            raise ValueError(
                f"--shots {self.n_shots}: all questions of {self.data} would be examples, and none would be asked; "
                "give fewer shots"
            )
        yield from blocks

    def body(self, question: Question) -> str:
        chinese = any("\u4e00" <= character <= "\u9fff" for character in question.text)
        return super().body(question).removesuffix(self.cue) + (self.cue if chinese else MMLUExam.cue)

    def description(self, title: str) -> str:
        return ""


def read_question(record: Mapping, number: str) -> Question:
    """Return the question in a record with "question", options under letters or "choices", and perhaps "answer" (a
    letter, the number of a choice, or its text).

    Raises ValueError that says what is missing.
    """
    record = {str(key).strip().lower(): value for key, value in record.items()}
    text = record.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError('expected a text as "question"')
    options = record.get("choices")
    if options is None:
        options = [record[letter] for letter in LETTERS.lower() if record.get(letter) not in (None, "")]
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f'expected 2 to {len(LETTERS)} options under "A", "B", ... or in a list "choices"')
    options = [str(option) for option in options]
    given = record.get("answer")
    if given is None or given == "":
        answer = None
    elif type(given) is int and 0 <= given < len(options):
        answer = given
    elif (letter := str(given).strip()).upper() in LETTERS[: len(options)] and letter:
        answer = LETTERS.index(letter.upper())
    elif str(given) in options:
        answer = options.index(str(given))
    else:
        raise ValueError(f'expected one of {", ".join(LETTERS[: len(options)])} as "answer", found {given!r}')
    return Question(str(record.get("id") or number), text, tuple(options), answer)

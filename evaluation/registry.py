"""The names of the benchmarks. This file is free of torch: the flags of eval.py are read from it.

A new benchmark is a file in evaluation/ with a subclass of `Task` (task.py), and a line here.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluation.task import Task

BENCHMARKS = {  # value of --task -> module and class
    "loss": ("evaluation.heldout_loss", "HeldoutLoss"),
    "poems": ("evaluation.poems", "PoemForms"),
    "ceval": ("evaluation.exams", "CEval"),
    "cmmlu": ("evaluation.exams", "CMMLUExam"),
    "aclue": ("evaluation.exams", "ACLUEExam"),
    "mmlu": ("evaluation.exams", "MMLUExam"),
    "choices": ("evaluation.exams", "OwnQuestions"),
    "blimp": ("evaluation.minimal_pairs", "BLiMP"),
    "zhoblimp": ("evaluation.minimal_pairs", "ZhoBLiMP"),
    "gsm8k": ("evaluation.generated", "GSM8K"),
    "answers": ("evaluation.generated", "OwnAnswers"),
    "perplexity": ("evaluation.perplexity", "Perplexity"),
    "longbench": ("evaluation.long_context", "LongBench"),
    "longbench_e": ("evaluation.long_context", "LongBenchE"),
    "longeval": ("evaluation.long_context", "LongEval"),
    "passkey": ("evaluation.passkey", "Passkey"),
}
EXAMS = ("ceval", "cmmlu", "aclue", "mmlu", "choices")  # questions with options, after solved examples
LONG = ("longbench", "longbench_e", "longeval", "passkey")  # answers to prompts that may be longer than the window
WITH_DATA = (
    *EXAMS,
    "blimp",
    "zhoblimp",
    "gsm8k",
    "answers",
    "perplexity",
    *LONG,
)  # benchmarks of items; all but passkey
# have them at --data


def make_task(name: str, settings: object) -> Task:
    """Return the benchmark of a name; each of its fields has the value of the same name in `settings`."""
    module, cls = BENCHMARKS[name]
    task = getattr(import_module(module), cls)
    return task(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(task)})

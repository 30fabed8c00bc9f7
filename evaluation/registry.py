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
}


def make_task(name: str, settings: object) -> Task:
    """Return the benchmark of a name; each of its fields has the value of the same name in `settings`."""
    module, cls = BENCHMARKS[name]
    task = getattr(import_module(module), cls)
    return task(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(task)})

"""Answers to a file of questions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from chat.conversations import to_prompt
from cli.progress import say
from corpora.files import bad, records
from corpora.registry import BadRecord
from decoding.feeder import check_prompts
from decoding.params import SamplingParams
from files import json_line, write_json_lines
from serving.assistant import Assistant


def answer_file(
    assistant: Assistant, path: Path, output: Path | None, params: SamplingParams, batch_size: int
) -> dict[str, Any]:
    """Write every record of --input with an "answer" beside its own fields; return the counts.

    A record has any form that fine-tuning reads, with or without an answer; an "answer" of its own becomes "expected".

    Each answer is written as soon as it is there. After an interruption, a call with the same questions, model and
    settings goes on behind the last whole answer, with the same answers as without it. Records that cannot be answered
    go with their places and reasons to a file beside `output`. Raises ValueError where there is no record to answer,
    before anything is written.
    """
    output = output or path.with_suffix(".answers.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"--input {path} is not a file of questions")
    if output.resolve() == path.resolve():
        raise ValueError(f"--output {output} would overwrite the questions; name another file")
    questions, prompts, broken = read_questions(assistant, path)
    begun = output.with_suffix(".begun.json")  # what the answers depend on; it is there until all are written
    done = begin(output, begun, describe(assistant, prompts, params))
    if done:
        say(f"{output} has {done} of {len(questions)} answers already: going on behind them")
    with output.open("ab") as file:
        answers = assistant.answers(prompts[done:], replace(params, seed=params.seed + done), batch_size)
        for question, answer in zip(questions[done:], answers):
            file.write(json_line({**question, "answer": answer}))
            file.flush()
    begun.unlink()
    print(f"{len(questions)} answers in {output}")
    keep_aside(broken, output.with_suffix(".bad.jsonl"))
    return {"answers": len(questions), "bad": len(broken), "output": str(output)}


def keep_aside(broken: list[BadRecord], path: Path) -> None:
    """Write the records that could not be read to a file, and say so; nothing where there are none."""
    if broken:
        write_json_lines(path, map(vars, broken))
        places = ", ".join(record.where for record in broken[:3]) + ", ..." * (len(broken) > 3)
        say(f"{len(broken)} records could not be read ({places}); they are kept in {path}")


def file_times(directory: Path) -> dict[str, list[int]]:
    """Return size and time of change of each file of a model, by which another model is told apart."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(directory.glob("*.*"))}


def begin(output: Path, begun: Path, description: dict[str, Any]) -> int:
    """Make `output` ready for more lines and return how many whole ones of the same description it has; where `begun`
    does not hold that description, the file is emptied."""
    text = json.dumps(description, indent=2)
    if begun.is_file() and output.is_file() and begun.read_text(encoding="utf8") == text:
        whole = output.read_bytes().rpartition(b"\n")
        output.write_bytes(b"".join(whole[:2]))  # without half a line after a kill
        return whole[0].count(b"\n") + bool(whole[1])
    output.write_bytes(b"")
    begun.write_text(text, encoding="utf8")
    return 0


def describe(assistant: Assistant, prompts: list[list[int]], params: SamplingParams) -> dict[str, Any]:
    """Return all that the answers depend on, as values that JSON can hold."""
    return {
        "model": {str(assistant.directory.resolve()): file_times(assistant.directory)},
        "decoding": [type(assistant.decoder).__name__, assistant.cache, repr(assistant.stop_strings.strings)],
        "sampling": {name: str(value) for name, value in vars(params).items()},
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }


def read_questions(assistant: Assistant, path: Path) -> tuple[list[dict], list[list[int]], list[BadRecord]]:
    """Return the records of a file that can be answered, their prompts, and the records that cannot."""
    questions, prompts, broken = [], [], []
    for record in records(path):
        if isinstance(record, BadRecord):
            broken.append(record)
            continue
        try:
            prompt = assistant.encode(to_prompt(record.value))
            check_prompts(assistant.model, [prompt], assistant.longest)
        except ValueError as error:
            broken.append(bad(record.where, str(error), json.dumps(record.value, ensure_ascii=False, default=str)))
            continue
        expected = {"expected": record.value["answer"]} if "answer" in record.value else {}
        questions.append(record.value | expected)
        prompts.append(prompt)
    if not questions:
        first = f"; the first record, {broken[0].where}: {broken[0].reason}" if broken else ", the file is empty"
        raise ValueError(f"{path} holds no questions: expected records as for fine-tuning, or with a prompt{first}")
    return questions, prompts, broken

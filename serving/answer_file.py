"""Answers to a file of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chat.messages import check_messages
from cli.progress import say
from corpora.files import bad, records
from corpora.registry import BadRecord
from decoding.feeder import check_prompts
from decoding.params import SamplingParams
from serving.assistant import Assistant


def answer_file(
    assistant: Assistant, path: Path, output: Path | None, params: SamplingParams, batch_size: int
) -> dict[str, Any]:
    """Write every record of --input with an "answer" beside its own fields; return the counts.

    Records that cannot be answered go with their places and reasons to a file beside `output`. Raises ValueError where
    there is no record to answer, before anything is written.
    """
    output = output or path.with_suffix(".answers.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"--input {path} is not a file of questions")
    if output.resolve() == path.resolve():
        raise ValueError(f"--output {output} would overwrite the questions; name another file")
    questions, prompts, broken = read_questions(assistant, path)
    with output.open("w", encoding="utf8", errors="backslashreplace") as file:  # half a surrogate pair stays its escape
        for question, answer in zip(questions, assistant.answers(prompts, params, batch_size)):
            file.write(json.dumps({**question, "answer": answer}, ensure_ascii=False, default=str) + "\n")
    print(f"{len(questions)} answers in {output}")
    if broken:
        aside = output.with_suffix(".bad.jsonl")
        lines = (json.dumps(vars(record), ensure_ascii=False) + "\n" for record in broken)
        aside.write_text("".join(lines), encoding="utf8")
        places = ", ".join(record.where for record in broken[:3]) + ", ..." * (len(broken) > 3)
        say(f"{len(broken)} records could not be read ({places}); they are kept in {aside}")
    return {"answers": len(questions), "bad": len(broken), "output": str(output)}


def read_questions(assistant: Assistant, path: Path) -> tuple[list[dict], list[list[int]], list[BadRecord]]:
    """Return the records of a file that can be answered, their prompts, and the records that cannot."""
    questions, prompts, broken = [], [], []
    for record in records(path):
        if isinstance(record, BadRecord):
            broken.append(record)
            continue
        try:
            prompt = assistant.encode(messages_of(record.value))
            check_prompts(assistant.model, [prompt], assistant.longest)
        except ValueError as error:
            broken.append(bad(record.where, str(error), json.dumps(record.value, ensure_ascii=False, default=str)))
            continue
        questions.append(record.value)
        prompts.append(prompt)
    if not questions:
        first = f"; the first record, {broken[0].where}: {broken[0].reason}" if broken else ", the file is empty"
        raise ValueError(f'{path} holds no prompts: expected records with "prompt" or "messages"{first}')
    return questions, prompts, broken


def messages_of(record: Any) -> list[dict]:
    """Return the conversation in a record, without the answer that it may end with."""
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return [{"role": "user", "content": record["prompt"]}]
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected an object with a text as "prompt" or a list as "messages"')
    check_messages(messages)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages

"""Files -> conversations, whatever form their records have.

A conversation is `[{"role": "system" | "user" | "assistant", "content": str}, ...]`, user and assistant in turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chat_template import check_messages
from corpora.files import bad, find_files, format_of, records
from corpora.registry import BadRecord

Messages = list[dict[str, Any]]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # other names of ours
SURROGATE = re.compile("[\ud800-\udfff]")  # bytes that were not UTF-8, or half a character: no tokenizer takes them
QUESTION_ANSWER = (
    ("prompt", "answer"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("input", "output"),
)


def chat(record: dict) -> Messages | None:
    """`messages` of OpenAI's API: `[{"role": "user", "content": "..."}, ...]`, `chat_rounds` of MFTCoder."""
    turns = record.get("messages") or record.get("chat_rounds")
    return [_turn(turn, "role", "content") for turn in turns] if isinstance(turns, list) else None


def sharegpt(record: dict) -> Messages | None:
    """`conversations` of ShareGPT: `[{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]`."""
    turns = record.get("conversations")
    return [_turn(turn, "from", "value") for turn in turns] if isinstance(turns, list) else None


def alpaca(record: dict) -> Messages | None:
    """`instruction`, `input` (may be missing or empty) and `output` of Alpaca."""
    if "instruction" not in record or "output" not in record:
        return None
    parts = (record["instruction"], record.get("input"))
    question = "\n".join(part for part in parts if isinstance(part, str) and part.strip())
    return _exchange(question, record["output"])


def question_answer(record: dict) -> Messages | None:
    """One of the pairs of keys in QUESTION_ANSWER."""
    for question, answer in QUESTION_ANSWER:
        if question in record and answer in record:
            return _exchange(record[question], record[answer])
    return None


FORMATS: tuple[Callable[[dict], Messages | None], ...] = (chat, sharegpt, alpaca, question_answer)


def _turn(turn: Any, role: str, content: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is {type(turn).__name__}, expected an object with {role!r} and {content!r}")
    return {"role": turn.get(role), "content": turn.get(content)}


def _exchange(question: Any, answer: Any) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def to_messages(record: Any) -> Messages:
    """The conversation in a record of any of FORMATS: [system], then user and assistant in turn, ending in an answer.

    A last question that nobody answers is left out. Raises ValueError with the reason when a record is broken.
    """
    if not isinstance(record, dict):
        raise ValueError(f"the record is {type(record).__name__}, expected an object with named fields")
    messages = next((found for read in FORMATS if (found := read(record)) is not None), None)
    if messages is None:
        raise ValueError(f"no question and answer under the keys {', '.join(map(str, record)) or '(none)'}")
    for message in messages:
        message["role"] = ROLES.get(str(message["role"]), message["role"])
    check_messages(messages)
    for n, message in enumerate(messages):
        if not message["content"].strip():
            raise ValueError(f"message {n} ({message['role']}) has no text: {message['content']!r}")
        if SURROGATE.search(message["content"]):
            raise ValueError(f"message {n} ({message['role']}) is not UTF-8")
    if messages[-1]["role"] == "user":
        messages.pop()
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("nothing is answered in it")
    return messages


def file_conversations(path: Path, broken: list[BadRecord]) -> Iterator[Messages]:
    """Every conversation in a json, jsonl, csv, tsv or parquet file (plain, .gz or .zst), or in those of a folder.

    What is no conversation is appended to `broken` with its place and the reason. Raises FileNotFoundError, and
    ValueError when there is no such file at `path` or when nothing in one of them is answered.
    """
    files = [file for file in find_files(Path(path)) if format_of(file) != "txt"]
    if not files:
        raise ValueError(f"{path} has no conversations; expected json, jsonl, csv, tsv or parquet, found plain text")
    for file in files:
        n_usable, n_before = 0, len(broken)
        for record in records(file):
            if isinstance(record, BadRecord):
                broken.append(record)
                continue
            try:
                messages = to_messages(record.value)
            except ValueError as error:
                broken.append(bad(record.where, str(error), str(record.value)))
                continue
            n_usable += 1
            yield messages
        if not n_usable:
            first = f"; the first, {broken[n_before].where}: {broken[n_before].reason}" if broken[n_before:] else ""
            raise ValueError(f"{file} has no usable answer in {len(broken) - n_before} records{first}")

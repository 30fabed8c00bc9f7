"""Files -> conversations, whatever form their records have.

A conversation is `[{"role": "system" | "user" | "assistant", "content": str}, ...]`, user and assistant in turn. An
answer with `"loss": False` is not trained. A text without roles is `[{"role": "text", "content": str}]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chat.messages import check_messages
from corpora.files import Record, bad, find_files, format_of, loaded, records
from corpora.registry import BadRecord

Messages = list[dict[str, Any]]
T = TypeVar("T")
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {"model": "assistant", "ai": "assistant"}  # other names of ours
SURROGATE = re.compile("[\ud800-\udfff]")  # bytes that were not UTF-8, or half a character: no tokenizer takes them
QUESTIONS = ("prompt", "question", "query", "q", "input")
ANSWERS = ("answer", "response", "completion", "a", "output")
PAIRS = (("chosen", "rejected"), ("response_chosen", "response_rejected"))
LISTS = ("messages", "conversations", "conversation", "chat_rounds")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")  # parts the turns in a text of HH-RLHF
KINDS = "json, jsonl, csv, tsv or parquet"


# --- forms of a record ------------------------------------------------------------------------------------------


def chat(record: dict) -> Messages | None:
    """A list of turns: OpenAI's `messages`, ShareGPT's `conversations`, MFTCoder's `chat_rounds`."""
    turns = next((record[key] for key in LISTS if isinstance(record.get(key), list)), None)
    return None if turns is None else _system(record) + _turns(turns)


def alpaca(record: dict) -> Messages | None:
    """`instruction`, `input` or `context` (may be missing or empty) and `output` or `response`; maybe `history`."""
    answer = next((key for key in ("output", "response") if key in record), None)
    if "instruction" not in record or answer is None:
        return None
    return [*_before(record), _said("user", _instruction(record)), _said("assistant", record[answer])]


def question_answer(record: dict) -> Messages | None:
    """One of QUESTIONS and one of ANSWERS. Raises ValueError when the record has several of either."""
    found = [[key for key in keys if key in record] for keys in (QUESTIONS, ANSWERS)]
    # Columns of a table that a row leaves empty say nothing, unless there is no other.
    question, answer = ([key for key in keys if record[key] is not None] or keys for keys in found)
    if not question or not answer:
        return None
    for kind, keys in (("question", question), ("answer", answer)):
        if len(keys) > 1:
            raise ValueError(f"it is not clear which is the {kind}: {' or '.join(keys)}")
    return [*_before(record), _said("user", record[question[0]]), _said("assistant", record[answer[0]])]


def plain_text(record: dict) -> Messages | None:
    """`text`, all of which is trained."""
    return [_said("text", record["text"])] if "text" in record else None


FORMS: tuple[Callable[[dict], Messages | None], ...] = (chat, alpaca, question_answer, plain_text)


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _system(record: dict) -> Messages:
    return _turns([_said("system", record.get("system"))])


def _before(record: dict) -> Messages:
    """What stands before the question of a flat record: `system`, and pairs of texts under `history`."""
    messages = _system(record)
    for pair in record.get("history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"history should be pairs of question and answer, found {pair!r:.100}")
        messages += [_said("user", pair[0]), _said("assistant", pair[1])]
    return messages


def _instruction(record: dict) -> str:
    parts = (record["instruction"], record.get("input"), record.get("context"))
    return "\n".join(part for part in parts if isinstance(part, str) and part.strip())


def _turns(turns: list) -> Messages:
    """The messages of a list of turns, without a system message in front that says nothing."""
    messages = [_turn(turn) for turn in turns]
    is_silent = messages and messages[0]["role"] == "system" and not str(messages[0]["content"] or "").strip()
    return messages[1:] if is_silent else messages


def _turn(turn: Any) -> dict[str, Any]:
    """A turn under any of its names: role or from, content, value or text; loss or weight says what is trained."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is {type(turn).__name__}, expected an object with 'role' and 'content'")
    role = str(turn.get("role", turn.get("from")))
    content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)  # OpenAI's parts, where all of them are texts
    message = _said(ROLES.get(role.lower(), role.lower()), content)
    loss = next((turn[key] for key in ("loss", "weight") if turn.get(key) is not None), None)
    if loss not in (None, 0, 1):
        raise ValueError(f"the loss (or weight) of a turn is true or false, 1 or 0, found {loss!r}")
    return message if loss in (None, 1) else message | {"loss": False}


# --- one record -------------------------------------------------------------------------------------------------


def to_messages(record: Any) -> Messages:
    """The conversation in a record of any of FORMS: [system], then user and assistant in turn, ending in an answer.

    A last question that nobody answers is left out. Raises ValueError with the reason when a record is broken.
    """
    messages = _read_turns(record)
    if messages[0]["role"] != "text":
        check_messages(messages)
    _check_texts(messages)
    if messages[-1]["role"] == "user":
        messages.pop()
    if not messages or messages[-1]["role"] not in ("assistant", "text"):
        raise ValueError("nothing is answered in it")
    return messages


def _read_turns(record: Any) -> Messages:
    if not isinstance(record, dict):
        raise ValueError(f"the record is {type(record).__name__}, expected an object with named fields")
    messages = next((found for read in FORMS if (found := read(record)) is not None), None)
    is_pair = any(chosen in record and rejected in record for chosen, rejected in PAIRS)
    if is_pair and not (messages and messages[-1]["role"] == "assistant"):
        raise ValueError("it holds a pair of answers, which are for preference tuning: --objective dpo or orpo")
    if messages is None:
        raise ValueError(f"no question and answer under the keys {', '.join(map(str, record)) or '(none)'}")
    if not messages:
        raise ValueError("a conversation needs at least one message")
    return messages


def _check_texts(messages: Messages) -> None:
    for n, message in enumerate(messages):
        content = message["content"]
        if not isinstance(content, str):
            raise ValueError(f"message {n} ({message['role']}) should be a string, found {content!r:.100}")
        if not content.strip():
            raise ValueError(f"message {n} ({message['role']}) has no text: {content!r}")
        if SURROGATE.search(content):
            raise ValueError(f"message {n} ({message['role']}) is not UTF-8")


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, for preference tuning."""

    prompt: Messages
    """ends with a user message"""
    chosen: str
    rejected: str

    def conversations(self) -> tuple[Messages, Messages]:
        """The whole conversation with the chosen answer, and with the rejected one."""
        chosen, rejected = (_said("assistant", answer) for answer in (self.chosen, self.rejected))
        return [*self.prompt, chosen], [*self.prompt, rejected]


def to_pair(record: Any) -> PreferencePair:
    """The pair in a record with `chosen` and `rejected` (or `response_chosen`, `response_rejected`).

    Each is a text, a turn, a whole list of turns, or HH-RLHF's transcript of them. The prompt comes in any of the forms
    of a conversation, the last answer of a list of turns left out; where the answers are whole lists, it is at least
    what they share. Raises ValueError with the reason.
    """
    if not isinstance(record, dict):
        raise ValueError(f"the record is {type(record).__name__}, expected an object with named fields")
    names = next((names for names in PAIRS if names[0] in record and names[1] in record), None)
    keys = ", ".join(map(str, record)) or "(none)"
    if names is None:
        raise ValueError(f"no chosen and rejected under the keys {keys}; conversations are for --objective sft")
    chosen, rejected = (_answer(record[name]) for name in names)
    prompt = _prompt(record)
    if shared := chosen[:-1] or rejected[:-1]:
        if rejected[:-1] not in ([], shared):
            raise ValueError("the chosen and the rejected conversation differ before their last answer")
        if prompt[-len(shared) :] != shared:  # else it may say more
            apart = [turn for turn in prompt[:1] if turn["role"] == "system" and shared[0]["role"] != "system"]
            prompt = apart + shared
    if not prompt:
        raise ValueError(f"no prompt under the keys {keys}, nor before the last answer of chosen and rejected")
    check_messages(prompt, add_generation_prompt=True)
    if any(_transcribed(value) is not value for value in record.values()):  # answers begin after a blank there
        chosen, rejected = ([_said("assistant", str(end["content"]).strip())] for end in (chosen[-1], rejected[-1]))
    _check_texts([*prompt, chosen[-1], rejected[-1]])
    if chosen[-1]["content"] == rejected[-1]["content"]:
        raise ValueError("the chosen and the rejected answer are the same")
    return PreferencePair(prompt, chosen[-1]["content"], rejected[-1]["content"])


def _answer(value: Any) -> Messages:
    """What was answered, with what was said before it if that is there."""
    value = _transcribed(value)
    if isinstance(value, str):
        return [_said("assistant", value)]
    turns = _turns(value if isinstance(value, list) else [value])
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"an answer should be a text or end with the assistant's turn, found {value!r:.100}")
    return turns


def _prompt(record: dict) -> Messages:
    """What both answers answer as far as the record says it apart."""
    if turns := chat(record):
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if "instruction" in record:
        return [*_before(record), _said("user", _instruction(record))]
    given = next((record[key] for key in QUESTIONS if record.get(key)), None)
    question = _transcribed(given)
    if isinstance(question, list):
        ended = question is not given and not question[-1]["content"]  # by an "Assistant:" that is to be answered
        return _system(record) + _turns(question[:-1] if ended else question)
    return _before(record) + ([] if question is None else [_said("user", question)])


def _transcribed(value: Any) -> Any:
    """The turns in a transcript of HH-RLHF; any other value as it is."""
    if not isinstance(value, str) or not value.startswith("\n\nHuman:"):
        return value
    said = TRANSCRIPT.split(value)[1:]  # who, what, who, what, ...
    return [_said(who, text.strip()) for who, text in zip(said[0::2], said[1::2])]


# --- files ------------------------------------------------------------------------------------------------------


def file_conversations(
    path: Path, broken: list[BadRecord], check: Callable[[Messages], None] | None = None
) -> Iterator[Messages]:
    """Every conversation at `path`: a json, jsonl, csv, tsv or parquet file (plain, .gz or .zst), a folder of them, or
    a Python file whose `data_loader()` yields records.

    What is no conversation, or what `check` raises ValueError for, is appended to `broken` with its place and the
    reason. Raises FileNotFoundError, and ValueError when there is no such file or when nothing in one is answered.
    """

    def read(value: Any) -> Messages:
        messages = to_messages(value)
        if check and messages[0]["role"] != "text":
            check(messages)
        return messages

    return _read_files(path, broken, read, "usable answer")


def preference_pairs(
    path: Path, broken: list[BadRecord], check: Callable[[Messages], None] | None = None
) -> Iterator[PreferencePair]:
    """Every pair of answers at `path`; like `file_conversations` otherwise."""

    def read(value: Any) -> PreferencePair:
        pair = to_pair(value)
        for messages in pair.conversations() if check else ():
            check(messages)
        return pair

    return _read_files(path, broken, read, "pair of answers")


def _read_files(path: Path, broken: list[BadRecord], read: Callable[[Any], T], wanted: str) -> Iterator[T]:
    for file, stream in _streams(Path(path)):
        n_usable, n_before = 0, len(broken)
        for record in stream:
            if isinstance(record, BadRecord):
                broken.append(record)
                continue
            try:
                value = read(record.value)
            except ValueError as error:
                broken.append(bad(record.where, str(error), str(record.value)))
                continue
            n_usable += 1
            yield value
        if not n_usable:
            first = f"; the first, {broken[n_before].where}: {broken[n_before].reason}" if broken[n_before:] else ""
            raise ValueError(f"{file} has no {wanted} in {len(broken) - n_before} records{first}")


def _streams(path: Path) -> Iterator[tuple[Path, Iterator[Record | BadRecord]]]:
    if path.suffix == ".py" and path.is_file():
        yield path, loaded(path)
        return
    files = [file for file in find_files(path) if format_of(file) != "txt"]
    if not files:
        raise ValueError(f"{path} has no conversations; expected {KINDS}, found plain text")
    yield from ((file, records(file)) for file in files)

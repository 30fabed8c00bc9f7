"""Read conversations and preference pairs from files whose records have any of the usual forms.

A conversation is `[{"role": "system" | "user" | "assistant", "content": str}, ...]`; user and assistant alternate.
An answer with `"loss": False` is not trained. A text without roles is `[{"role": "text", "content": str}]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chat.messages import check_messages
from corpora.files import Record, bad, find_files, format_of, loader_records, records
from corpora.registry import BadRecord

Messages = list[dict[str, Any]]
T = TypeVar("T")
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {"model": "assistant", "ai": "assistant"}  # other names -> our names
SURROGATE = re.compile("[\ud800-\udfff]")  # bytes that are not UTF-8, or half a character: no tokenizer encodes them
QUESTIONS = ("prompt", "question", "query", "q", "input")
ANSWERS = ("answer", "response", "completion", "a", "output")
PAIRS = (("chosen", "rejected"), ("response_chosen", "response_rejected"))
LISTS = ("messages", "conversations", "conversation", "chat_rounds")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")  # separates the turns in a text of HH-RLHF
KINDS = "json, jsonl, csv, tsv or parquet"


# --- forms of a record ------------------------------------------------------------------------------------------


def chat(record: dict) -> Messages | None:
    """Read a list of turns: OpenAI's `messages`, ShareGPT's `conversations`, MFTCoder's `chat_rounds`; else None."""
    turns = next((record[key] for key in LISTS if isinstance(record.get(key), list)), None)
    return None if turns is None else _system(record) + _turns(turns)


def alpaca(record: dict) -> Messages | None:
    """Read `instruction` and `output` or `response`, with optional `input`, `context`, `history`; else None."""
    answer = next((key for key in ("output", "response") if key in record), None)
    if "instruction" not in record or answer is None:
        return None
    return [*_before(record), _message("user", _instruction(record)), _message("assistant", record[answer])]


def question_answer(record: dict) -> Messages | None:
    """Read one of the keys QUESTIONS and one of ANSWERS; else None. Raises ValueError for several of either."""
    present = [[key for key in keys if key in record] for keys in (QUESTIONS, ANSWERS)]
    # Ignore columns of a table that are empty in this row, unless there is no other.
    question, answer = ([key for key in keys if record[key] is not None] or keys for keys in present)
    if not question or not answer:
        return None
    for kind, keys in (("question", question), ("answer", answer)):
        if len(keys) > 1:
            raise ValueError(f"the record has {len(keys)} keys for its {kind} ({', '.join(keys)}): remove all but one")
    return [*_before(record), _message("user", record[question[0]]), _message("assistant", record[answer[0]])]


def plain_text(record: dict) -> Messages | None:
    """Read `text`, a text without roles that is trained as a whole; else None."""
    return [_message("text", record["text"])] if "text" in record else None


FORMS: tuple[Callable[[dict], Messages | None], ...] = (chat, alpaca, question_answer, plain_text)


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _system(record: dict) -> Messages:
    return _turns([_message("system", record.get("system"))])


def _before(record: dict) -> Messages:
    """Return the messages before the question of a record without a list of turns: its `system` and `history`."""
    messages = _system(record)
    for pair in record.get("history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"history should be a list of pairs of question and answer, found {pair!r:.100}")
        messages += [_message("user", pair[0]), _message("assistant", pair[1])]
    return messages


def _instruction(record: dict) -> str:
    parts = (record["instruction"], record.get("input"), record.get("context"))
    return "\n".join(part for part in parts if isinstance(part, str) and part.strip())


def _turns(turns: list) -> Messages:
    """Return the messages of a list of turns, without an empty system message at the beginning."""
    messages = [_turn(turn) for turn in turns]
    is_empty = messages and messages[0]["role"] == "system" and not str(messages[0]["content"] or "").strip()
    return messages[1:] if is_empty else messages


def _turn(turn: Any) -> dict[str, Any]:
    """Return the message of a turn: its `role` or `from`; `content`, `value` or `text`; and `loss` or `weight`."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn should be an object with 'role' and 'content', found {type(turn).__name__}")
    role = str(turn.get("role", turn.get("from")))
    content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)  # OpenAI's list of parts, if all of them are texts
    message = _message(ROLES.get(role.lower(), role.lower()), content)
    loss = next((turn[key] for key in ("loss", "weight") if turn.get(key) is not None), None)
    if loss not in (None, 0, 1):
        raise ValueError(f"the loss (or weight) of a turn should be true, false, 1 or 0, found {loss!r}")
    return message if loss in (None, 1) else message | {"loss": False}


# --- one record -------------------------------------------------------------------------------------------------


def to_messages(record: Any) -> Messages:
    """Return the conversation in a record of any of FORMS: a system message or none, then questions and answers.

    A last question without an answer is left out. Raises ValueError with the reason when the record is broken.
    """
    messages = _read_turns(record)
    if messages[0]["role"] != "text":
        check_messages(messages)
    _check_texts(messages)
    if messages[-1]["role"] == "user":
        messages.pop()
    if not messages or messages[-1]["role"] not in ("assistant", "text"):
        raise ValueError("the conversation has no answer")
    return messages


def _read_turns(record: Any) -> Messages:
    if not isinstance(record, dict):
        raise ValueError(f"the record should be an object with named fields, found {type(record).__name__}")
    messages = next((turns for read in FORMS if (turns := read(record)) is not None), None)
    is_pair = any(chosen in record and rejected in record for chosen, rejected in PAIRS)
    if is_pair and not (messages and messages[-1]["role"] == "assistant"):
        raise ValueError("the record is a pair of answers: use a preference objective, such as --objective dpo")
    if messages is None:
        keys = ", ".join(map(str, record)) or "(none)"
        raise ValueError(f"the record has no question and answer under names known here; its keys are {keys}")
    if not messages:
        raise ValueError("a conversation needs at least one message")
    return messages


def _check_texts(messages: Messages) -> None:
    for n, message in enumerate(messages):
        content = message["content"]
        if not isinstance(content, str):
            raise ValueError(f"message {n} ({message['role']}) should be a string, found {content!r:.100}")
        if not content.strip():
            raise ValueError(f"message {n} ({message['role']}) should not be empty, found {content!r}")
        if SURROGATE.search(content):
            raise ValueError(f"message {n} ({message['role']}) is not UTF-8")


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, for preference tuning."""

    prompt: Messages  # Messages before the answers; the last one is the user's.
    chosen: str  # Text of the better answer.
    rejected: str  # Text of the worse answer.

    def conversations(self) -> tuple[Messages, Messages]:
        """Return the whole conversation with the chosen answer, and with the rejected one."""
        chosen, rejected = (_message("assistant", answer) for answer in (self.chosen, self.rejected))
        return [*self.prompt, chosen], [*self.prompt, rejected]


def to_pair(record: Any) -> PreferencePair:
    """Return the pair in a record with `chosen` and `rejected` (or `response_chosen`, `response_rejected`).

    Each of the two is a text, a turn, a whole list of turns, or a transcript in the form of HH-RLHF. The prompt has any
    form of a conversation; the last answer of a list of turns is left out. If the answers are whole lists, the prompt
    is the turns that they share. Raises ValueError with the reason.
    """
    if not isinstance(record, dict):
        raise ValueError(f"the record should be an object with named fields, found {type(record).__name__}")
    names = next((names for names in PAIRS if names[0] in record and names[1] in record), None)
    keys = ", ".join(map(str, record)) or "(none)"
    if names is None:
        raise ValueError(
            f"expected the keys chosen and rejected, found {keys}; conversations are trained with --objective sft"
        )
    chosen, rejected = (_answer(record[name]) for name in names)
    prompt = _prompt(record)
    if shared := chosen[:-1] or rejected[:-1]:
        if rejected[:-1] not in ([], shared):
            raise ValueError("the chosen and the rejected conversation differ before their last answer")
        if prompt[-len(shared) :] != shared:  # a prompt that ends with the shared turns may have more before them
            system = [turn for turn in prompt[:1] if turn["role"] == "system" and shared[0]["role"] != "system"]
            prompt = system + shared
    if not prompt:
        raise ValueError(f"no prompt under the keys {keys}, nor before the last answer of chosen and rejected")
    check_messages(prompt, add_generation_prompt=True)
    if any(_split_transcript(value) is not value for value in record.values()):  # answers there begin with a space
        chosen, rejected = ([_message("assistant", str(end["content"]).strip())] for end in (chosen[-1], rejected[-1]))
    _check_texts([*prompt, chosen[-1], rejected[-1]])
    if chosen[-1]["content"] == rejected[-1]["content"]:
        raise ValueError("the chosen and the rejected answer are the same")
    return PreferencePair(prompt, chosen[-1]["content"], rejected[-1]["content"])


def _answer(value: Any) -> Messages:
    """Return the messages of `chosen` or `rejected`; the last one is the answer, those before it are optional."""
    value = _split_transcript(value)
    if isinstance(value, str):
        return [_message("assistant", value)]
    turns = _turns(value if isinstance(value, list) else [value])
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"an answer should be a text or turns that end with the assistant's, found {value!r:.100}")
    return turns


def _prompt(record: dict) -> Messages:
    """Return the messages before the answers, from the keys of a record other than those of the answers."""
    if turns := chat(record):
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if "instruction" in record:
        return [*_before(record), _message("user", _instruction(record))]
    value = next((record[key] for key in QUESTIONS if record.get(key)), None)
    question = _split_transcript(value)
    if isinstance(question, list):
        # a transcript may end with "Assistant:", after which the answer would follow
        is_open = question is not value and not question[-1]["content"]
        return _system(record) + _turns(question[:-1] if is_open else question)
    return _before(record) + ([] if question is None else [_message("user", question)])


def _split_transcript(value: Any) -> Any:
    """Return the turns in a transcript in the form of HH-RLHF; any other value unchanged."""
    if not isinstance(value, str) or not value.startswith("\n\nHuman:"):
        return value
    parts = TRANSCRIPT.split(value)[1:]  # role, text, role, text, ...
    return [_message(role, text.strip()) for role, text in zip(parts[0::2], parts[1::2])]


# --- files ------------------------------------------------------------------------------------------------------


def file_conversations(path: Path, broken: list[BadRecord]) -> Iterator[Messages]:
    """Yield every conversation at `path`, see `read_files`."""
    return read_files(path, broken, to_messages, "usable answer")


def read_files(path: Path, broken: list[BadRecord], read: Callable[[Any], T], kind: str) -> Iterator[T]:
    """Yield `read(value)` of every record at `path`.

    path: a json, jsonl, csv, tsv or parquet file (plain or compressed), a folder of them, or a Python file whose
        `data_loader()` yields records
    broken: list to which records that `read` refuses by ValueError are appended, with their place and the reason
    kind: what a usable record has, for the error

    Raises FileNotFoundError, and ValueError for an unknown format or a file without any usable record.
    """
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
            raise ValueError(f"{file} has no {kind} in {len(broken) - n_before} records{first}")


def _streams(path: Path) -> Iterator[tuple[Path, Iterator[Record | BadRecord]]]:
    """Yield each file at `path` with its records."""
    if path.suffix == ".py" and path.is_file():
        yield path, loader_records(path)
        return
    files = [file for file in find_files(path) if format_of(file) != "txt"]
    if not files:
        raise ValueError(f"{path}: expected conversations in {KINDS}, found only plain text")
    yield from ((file, records(file)) for file in files)

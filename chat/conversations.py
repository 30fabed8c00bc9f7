"""Read conversations and preference pairs from files whose records have any of the usual forms.

A conversation is `[{"role": "system" | "user" | "assistant" | "tool", "content": str}, ...]`, see `chat/messages.py`.
An answer with `"loss": False` is not trained. A text without roles is `[{"role": "text", "content": str}]`.

Nothing of a record is lost in silence: each key is used, or named (`Fields.left_out`), or the record is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chat.messages import check_messages, texts
from chat.turns import Fields, as_text, read_tools, read_turns, with_tools
from corpora.files import Record, bad, find_files, format_of, loader_records, records
from corpora.registry import BadRecord
from corpora.streams import not_utf8, printable

Messages = list[dict[str, Any]]
T = TypeVar("T")
QUESTIONS = ("prompt", "question", "query", "q", "ask", "input")
ANSWERS = ("answer", "response", "completion", "a", "output")
PAIRS = (("chosen", "rejected"), ("response_chosen", "response_rejected"), ("chosen_messages", "rejected_messages"))
LISTS = ("messages", "conversations", "conversation", "chat_rounds")
SYSTEM = ("system", "system_prompt")
MEDIA = ("images", "videos", "audios", "image", "video", "audio")
RATINGS = ("label", "kto_tag")  # of KTO: whether the answer is a good one
LABELS = ("task",)  # that data_process.py writes beside a conversation
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")  # separates the turns in a text of HH-RLHF
KINDS = "json, jsonl, csv, tsv or parquet"
ACCEPTED = (
    f"a list of turns under {', '.join(LISTS)}; instruction with output or response; one of {', '.join(QUESTIONS)} "
    f"with one of {', '.join(ANSWERS)}; or text (docs/finetuning.md has a table)"
)
UNANSWERED = "a last question or result without an answer, which is left out"


# --- forms of a record ------------------------------------------------------------------------------------------


def chat(record: Fields) -> Messages | None:
    """Read a list of turns: OpenAI's `messages`, ShareGPT's `conversations`, MFTCoder's `chat_rounds`; else None."""
    key = next((key for key in LISTS if key in record and isinstance(record[key], list)), None)
    return None if key is None else _system(record) + read_turns(record[key], record.left_out)


def alpaca(record: Fields) -> Messages | None:
    """Read `instruction` and `output` or `response`, with optional `input`, `context`, `history`; else None."""
    if "instruction" not in record or not any(key in record for key in ("output", "response")):
        return None
    answer = record.first(("output", "response"))
    return [*_before(record), _message("user", _instruction(record)), _message("assistant", answer)]


def question_answer(record: Fields) -> Messages | None:
    """Read one of the keys QUESTIONS and one of ANSWERS; else None. Raises ValueError for several of either."""
    present = [[key for key in keys if key in record] for keys in (QUESTIONS, ANSWERS)]
    if not all(present):
        return None
    for kind, keys in zip(("question", "answer"), present):
        if len(several := list(filter(record.has, keys))) > 1:  # not columns of a table that are empty in this row
            names = ", ".join(several)
            raise ValueError(f"the record has {len(several)} keys for its {kind} ({names}): remove all but one")
    question, answer = map(record.first, present)
    if isinstance(question, list) and isinstance(answer, list):
        return _system(record) + read_turns(question + answer, record.left_out)
    return [*_before(record), _message("user", question), _message("assistant", answer)]


def plain_text(record: Fields) -> Messages | None:
    """Read `text`, a text without roles that is trained as a whole; else None."""
    return [_message("text", record["text"])] if "text" in record else None


FORMS: tuple[Callable[[Fields], Messages | None], ...] = (chat, alpaca, question_answer, plain_text)


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _system(record: Fields) -> Messages:
    system = record.first(SYSTEM)
    return [] if system is None else read_turns([_message("system", system)], record.left_out)


def _before(record: Fields) -> Messages:
    """Return the messages before the question of a record without a list of turns: its `system` and `history`."""
    messages = _system(record)
    history = record["history"] if record.has("history") else []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"history should be a list of pairs of question and answer, found {pair!r:.100}")
        messages += [_message("user", pair[0]), _message("assistant", pair[1])]
    return messages


def _instruction(record: Fields) -> str:
    parts = [as_text(record.get(key)) for key in ("instruction", "input", "context")]
    return "\n".join(part for part in parts if part.strip())


# --- one record --------------------------------------------------------------------------------------------


def to_messages(record: Any, left_out: set[str] | None = None) -> Messages:
    """Return the conversation in a record of any of FORMS: a system message or none, then questions and answers.

    A last question without an answer is left out. Phrases on what of the record is not used are added to `left_out`.
    Raises ValueError with the reason when the record is broken.
    """
    fields = _fields(record, left_out)
    messages = _read_turns(fields)
    if messages[0]["role"] != "text":
        check_messages(messages)
    _check_texts(messages)
    _note_unread(fields, messages)
    while messages and messages[-1]["role"] in ("user", "tool"):
        messages.pop()
        fields.left_out.add(UNANSWERED)
    if not messages or messages[-1]["role"] not in ("assistant", "text"):
        raise ValueError("the conversation has no answer")
    return messages


def to_prompt(record: Any) -> Messages:
    """Return what a model is asked by a record of any form, with or without an answer: the messages before the answer.

    Raises ValueError with the reason when the record is broken.
    """
    fields = _fields(record, None)
    if any(chosen in fields and rejected in fields for chosen, rejected in PAIRS):
        return to_pair(record).prompt
    messages = _first_form(fields) or _prompt(fields)
    if not messages or messages[0]["role"] == "text":
        raise ValueError(f"the record has no question under names known here; its keys are {_keys(fields)}")
    messages = with_tools(messages[:-1] if messages[-1]["role"] == "assistant" else messages, read_tools(fields))
    check_messages(messages, add_generation_prompt=True)
    _check_texts(messages)
    return messages


def _fields(record: Any, left_out: set[str] | None) -> Fields:
    """Return the fields of a record. Raises ValueError for what cannot be trained here: no object, or images."""
    if not isinstance(record, dict):
        raise ValueError(f"the record should be an object with named fields, found {type(record).__name__}")
    fields = Fields(record, left_out)
    if media := next(filter(fields.has, MEDIA), None):
        raise ValueError(f"the record has {media}: only text is trained; leave such records out")
    return fields


def _first_form(fields: Fields) -> Messages | None:
    for form in FORMS:
        fields.read.clear()  # of a form that it does not have
        if (messages := form(fields)) is not None:
            return messages
    return None


def _read_turns(fields: Fields) -> Messages:
    messages = _first_form(fields)
    is_pair = any(chosen in fields and rejected in fields for chosen, rejected in PAIRS)
    if is_pair and not (messages and messages[-1]["role"] == "assistant"):
        raise ValueError("the record is a pair of answers: use a preference objective, such as --objective dpo")
    if rating := next((key for key in RATINGS if str(dict.get(fields, key)).lower() in ("true", "false")), None):
        raise ValueError(
            f"the record is one of KTO, because its {rating} says whether the answer is a good one: keep the records "
            f"where it is true, without {rating}, or make pairs of a chosen and a rejected answer for --objective dpo"
        )
    if messages is None:
        raise ValueError(
            f"the record has no question and answer under names known here; its keys are {_keys(fields)}. "
            f"Expected {ACCEPTED}"
        )
    if not messages:
        raise ValueError("a conversation needs at least one message")
    return with_tools(messages, read_tools(fields))


def _keys(record: dict) -> str:
    keys = ", ".join(map(str, record)) or "(none)"
    return " - ".join(map(printable, filter(None, [keys, not_utf8(keys)])))


def _note_unread(fields: Fields, messages: Messages) -> None:
    """Add the keys that were not read to `fields.left_out`, but those whose text stands in the messages."""
    known = {message["content"] for message in messages}
    keys = (key for key in fields.unread() if key not in LABELS)
    lost = (key for key in keys if not isinstance(fields[key], str) or fields[key] not in known)
    fields.left_out |= {printable(f"`{key}`, which is not used") for key in lost}


def _check_texts(messages: Messages) -> None:
    for n, message in enumerate(messages):
        content = message["content"]
        if not isinstance(content, str):
            raise ValueError(f"message {n} ({message['role']}) should be a string, found {content!r:.100}")
        if not content.strip() and message["role"] != "tool" and "tool_calls" not in message:
            raise ValueError(f"message {n} ({message['role']}) should not be empty, found {content!r}")
        if reason := next(filter(None, map(not_utf8, texts(message))), ""):  # no tokenizer encodes it
            raise ValueError(f"message {n} ({message['role']}) is {reason}")


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, for preference tuning."""

    prompt: Messages  # Messages before the answers; the last one is the user's, or the result of a call.
    chosen: str | dict[str, Any]  # Text of the better answer; its message where it has a thought or calls.
    rejected: str | dict[str, Any]  # The worse answer in the same form.

    def conversations(self) -> tuple[Messages, Messages]:
        """Return the whole conversation with the chosen answer, and with the rejected one."""
        answers = (self.chosen, self.rejected)
        chosen, rejected = (_message("assistant", each) if isinstance(each, str) else each for each in answers)
        return [*self.prompt, chosen], [*self.prompt, rejected]


def to_pair(record: Any, left_out: set[str] | None = None) -> PreferencePair:
    """Return the pair in a record with `chosen` and `rejected`, or one of the other names in PAIRS.

    Each of the two is a text, a turn, a whole list of turns, or a transcript in the form of HH-RLHF. The prompt has any
    form of a conversation; the last answer of a list of turns is left out. If the answers are whole lists, the prompt
    is the turns that they share. Phrases on what of the record is not used are added to `left_out`. Raises ValueError
    with the reason.
    """
    record = _fields(record, left_out)
    names = next((names for names in PAIRS if names[0] in record and names[1] in record), None)
    if names is None:
        raise ValueError(
            f"expected the keys chosen and rejected, found {_keys(record)}; "
            "conversations are trained with --objective sft"
        )
    chosen, rejected = (_answer(record[name], record.left_out) for name in names)
    prompt = _prompt(record)
    if shared := chosen[:-1] or rejected[:-1]:
        if rejected[:-1] not in ([], shared):
            raise ValueError("the chosen and the rejected conversation differ before their last answer")
        if prompt[-len(shared) :] != shared:  # a prompt that ends with the shared turns may have more before them
            system = [turn for turn in prompt[:1] if turn["role"] == "system" and shared[0]["role"] != "system"]
            if any(turn not in system + shared for turn in prompt):
                record.left_out.add("a prompt beside answers that are whole conversations, which is not used")
            prompt = system + shared
    prompt = with_tools(prompt, read_tools(record))
    if not prompt:
        raise ValueError(f"no prompt under the keys {_keys(record)}, nor before the last answer of chosen and rejected")
    check_messages(prompt, add_generation_prompt=True)
    ends = [{key: value for key, value in each[-1].items() if key != "loss"} for each in (chosen, rejected)]
    if any(_split_transcript(value) is not value for value in record.values()):  # answers there begin with a space
        ends = [_message("assistant", str(end["content"]).strip()) for end in ends]
    _check_texts([*prompt, *ends])
    if ends[0] == ends[1]:
        raise ValueError("the chosen and the rejected answer are the same")
    _note_unread(record, [*prompt, *ends])
    return PreferencePair(prompt, *(end["content"] if len(end) == 2 else end for end in ends))


def _answer(value: Any, left_out: set[str]) -> Messages:
    """Return the messages of `chosen` or `rejected`; the last one is the answer, those before it are optional."""
    value = _split_transcript(value)
    if isinstance(value, str):
        return [_message("assistant", value)]
    turns = read_turns(value if isinstance(value, list) else [value], left_out)
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"an answer should be a text or turns that end with the assistant's, found {value!r:.100}")
    return turns


def _prompt(record: Fields) -> Messages:
    """Return the messages before the answers, from the keys of a record other than those of the answers."""
    if turns := chat(record):
        if turns[-1]["role"] != "assistant":
            return turns
        record.left_out.add("an answer beside the two of the pair, which is not used")
        return turns[:-1]
    if "instruction" in record:
        return [*_before(record), _message("user", _instruction(record))]
    value = record.first(filter(record.has, QUESTIONS))
    question = _split_transcript(value)
    if isinstance(question, list):
        # a transcript may end with "Assistant:", after which the answer would follow
        is_open = question is not value and not question[-1]["content"]
        return _system(record) + read_turns(question[:-1] if is_open else question, record.left_out)
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

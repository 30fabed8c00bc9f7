"""Files and records of every form against the conversations that were written into them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from char_template import exchange

from conversations import file_conversations, to_messages

# --- records -> conversations


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"chat_rounds": [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": None, "output": "a", "id": 7},
        {"instruction": "q", "output": "a"},
        {"instruction": "", "input": "q", "output": "a"},
        *({q: "q", a: "a"} for q in ("prompt", "question") for a in ("answer", "response")),
        {"query": "q", "answer": "a"},
        {"input": "q", "output": "a"},
        {"messages": None, "prompt": "q", "answer": "a"},
    ],
)
def test_the_usual_records_are_one_conversation(record):
    assert to_messages(record) == exchange("q", "a")


def test_alpaca_input_belongs_to_the_question():
    record = {"instruction": "译成英文：", "input": "江上", "output": "On the river"}
    assert to_messages(record) == exchange("译成英文：\n江上", "On the river")


def test_turns_after_a_system_message_and_a_last_question_nobody_answers():
    turns = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2"), ("human", "q3")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    assert to_messages(record) == [{"role": "system", "content": "s"}, *exchange("q1", "a1", "q2", "a2")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["q", "a"], "the record is list, expected an object"),
        ("q", "the record is str"),
        ({}, r"under the keys \(none\)"),
        ({"prompt": "q"}, "no question and answer under the keys prompt"),
        ({"prompt": "q", "answer": ""}, r"message 1 \(assistant\) has no text: ''"),
        ({"prompt": "q", "answer": " \n"}, r"message 1 \(assistant\) has no text"),
        ({"question": "q", "answer": None}, r"string, found .*None"),
        ({"question": "q", "answer": 3}, r"string, found .*3"),
        ({"instruction": "", "input": "", "output": "a"}, r"message 0 \(user\) has no text"),
        ({"question": "q", "answer": "a\ud800"}, r"message 1 \(assistant\) is not UTF-8"),
        ({"messages": []}, "no question and answer"),
        ({"conversations": []}, "at least one message"),
        ({"messages": exchange("q")}, "nothing is answered"),
        ({"messages": [{"role": "system", "content": "s"}, *exchange("q")]}, "nothing is answered"),
        ({"messages": ["q", "a"]}, "a turn is str, expected an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "string, found .*None"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 0 should be of role system or user, found 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 0 should be of role"),
        ({"messages": exchange("q", "a")[::-1]}, "message 0 should be of role system or user, found 'assistant'"),
        ({"messages": exchange("q", "a")[:1] * 2}, "message 1 should be of role assistant, found 'user'"),
        (
            {"messages": [*exchange("q", "a"), {"role": "system", "content": "s"}]},
            "message 2 should be of role user, found 'system'",
        ),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 0 should be"),
    ],
)
def test_broken_records_say_why(record, reason):
    with pytest.raises(ValueError, match=reason):
        to_messages(record)


# --- files -> conversations

GOOD = [{"prompt": "问一", "answer": "答一"}, {"prompt": 'say, "two"', "answer": "two\nlines"}]
EXPECTED = [exchange(record["prompt"], record["answer"]) for record in GOOD]


def write(path: Path, rows: list[dict]) -> Path:
    """The same records in the format of the name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        array = json.dumps(rows, ensure_ascii=False, indent=1)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(array if path.suffix == ".json" else lines, encoding="utf8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_conversations_of_every_file_format(tmp_path, name):
    broken = []
    assert list(file_conversations(write(tmp_path / name, GOOD), broken)) == EXPECTED and not broken


def test_conversations_of_a_parquet_column_of_turns(tmp_path):
    path = write(tmp_path / "a.parquet", [{"messages": exchange("q", "a")}, {"messages": exchange("q", "a", "q", "a")}])
    assert list(file_conversations(path, [])) == [exchange("q", "a"), exchange("q", "a", "q", "a")]


def test_a_folder_is_its_files_in_order_without_plain_text(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.jsonl", GOOD)
    write(tmp_path / "a.csv", [{"instruction": "q", "input": "", "output": "a"}])
    (tmp_path / "README.txt").write_text("about these files")
    assert list(file_conversations(tmp_path, [])) == [exchange("q", "a"), *EXPECTED]


def test_broken_records_are_kept_with_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    with path.open("ab") as file:
        file.write(b'{"prompt": "q"\n[1]\n{"prompt": "q", "answer": ""}\n{"prompt": "q", "answer": "\xff\xfe"}\n')
    broken = []
    assert list(file_conversations(path, broken)) == EXPECTED
    assert [record.where for record in broken] == [f"{path}:{line}" for line in (3, 4, 5, 6)]
    for record, reason in zip(broken, ("not JSON", "is list", "has no text", "not UTF-8")):
        assert reason in record.reason


def test_files_without_an_answer_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": "q", "answer": ""}])
    with pytest.raises(ValueError, match=r"no usable answer in 2 records; the first, .*a.jsonl:1: no question"):
        list(file_conversations(path, []))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl has no usable answer in 0 records"):
        list(file_conversations(tmp_path / "empty.jsonl", []))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="expected json, jsonl, csv, tsv or parquet, found plain text"):
        list(file_conversations(tmp_path / "a.txt", []))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(file_conversations(tmp_path / "nowhere.jsonl", []))

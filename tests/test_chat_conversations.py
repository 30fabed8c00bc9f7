"""Files and records of every form against the conversations that were written into them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.character_template import exchange

from chat.conversations import PreferencePair, file_conversations, read_files, to_messages, to_pair

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
        {"q": "q", "a": "a"},
        {"prompt": "q", "completion": "a"},
        {"input": "q", "output": "a"},
        {"instruction": "q", "response": "a", "category": "open_qa"},
        {"instruction": "q", "input": "", "output": "a", "history": [], "system": "", "text": "q a"},
        {"messages": None, "prompt": "q", "answer": "a"},
        {"prompt": "q", "prompt_id": "1", "messages": exchange("q", "a")},
        {"question": "q", "answer": "a", "response": None},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"conversations": [{"role": "Human", "text": "q"}, {"role": "ChatGPT", "text": "a"}]},
        {"messages": [{"role": "system", "content": ""}, *exchange("q", "a")]},
        {
            "conversations": [
                {"from": "system", "value": None},
                {"from": "human", "value": "q"},
                *exchange("q", "a")[1:],
            ]
        },
        {"system": "\n", "prompt": "q", "answer": "a"},
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


def test_what_stands_before_the_question_of_a_flat_record():
    record = {"system": "s", "history": [["q1", "a1"]], "instruction": "q2", "input": "", "output": "a2"}
    assert to_messages(record) == [{"role": "system", "content": "s"}, *exchange("q1", "a1", "q2", "a2")]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert to_messages({"system": "s", "conversations": turns})[0] == {"role": "system", "content": "s"}
    dolly = {"instruction": "q", "context": "c", "response": "a"}
    assert to_messages(dolly) == exchange("q\nc", "a")


def test_a_text_without_roles_is_one_message():
    assert to_messages({"text": "all of it"}) == [{"role": "text", "content": "all of it"}]


@pytest.mark.parametrize("key, off", [("loss", False), ("loss", 0), ("weight", 0), ("weight", 0.0)])
def test_turns_that_are_no_targets(key, off):
    turns = [message | {key: True} for message in exchange("q", "a", "q", "a")]
    turns[1][key] = off
    expected = exchange("q", "a", "q", "a")
    expected[1]["loss"] = False
    assert to_messages({"messages": turns}) == expected


# --- preference pairs

QUESTION = {"role": "user", "content": "q"}
EMPTY = {"role": "system", "content": ""}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [QUESTION], "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
        {"prompt": "q", "chosen": exchange("q", "a"), "rejected": exchange("q", "b")},
        {"chosen": exchange("q", "a"), "rejected": exchange("q", "b")},
        {"question": "q", "response_chosen": "a", "response_rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"prompt": "q", "messages": exchange("q", "a"), "chosen": exchange("q", "a"), "rejected": exchange("q", "b")},
        {"conversations": exchange("q", "c"), "chosen": "a", "rejected": "b"},
        {"chosen": [EMPTY, *exchange("q", "a")], "rejected": exchange("q", "b")},
        {"prompt": [EMPTY, QUESTION], "chosen": "a", "rejected": "b"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
    ],
)
def test_every_form_of_a_pair_is_one_prompt_and_two_answers(record):
    pair = to_pair(record)
    assert pair == PreferencePair([QUESTION], "a", "b")
    assert pair.conversations() == (exchange("q", "a"), exchange("q", "b"))


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"prompt": "q", "chosen": "a"}, "expected the keys chosen and rejected, found prompt, chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "the same"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, r"message 2 \(assistant\) should not be empty"),
        ({"chosen": exchange("q", "a"), "rejected": exchange("p", "b")}, "differ before their last answer"),
        ({"chosen": "a", "rejected": "b"}, "no prompt under the keys chosen, rejected, nor before the last answer"),
        ({"prompt": "q", "chosen": exchange("q"), "rejected": "b"}, "end with the assistant's"),
        (
            {"prompt": exchange("q", "a"), "chosen": "a", "rejected": "b"},
            "the last message .* found 'assistant'",
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: p", "rejected": "b"},
            "end with the assistant's",
        ),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:"}, "should not be empty"),
    ],
)
def test_broken_pairs_say_why(record, reason):
    with pytest.raises(ValueError, match=reason):
        to_pair(record)


def test_what_stands_before_whole_answers_belongs_to_their_prompt():
    system, answers = {"role": "system", "content": "s"}, {"chosen": exchange("q", "a"), "rejected": exchange("q", "b")}
    for record in ({"system": "s"}, {"system": "s", "prompt": "q"}, {"prompt": [system, QUESTION]}):
        assert to_pair(record | answers).prompt == [system, QUESTION]
    assert to_pair({"prompt": exchange("p", "c", "q")} | answers).prompt == exchange("p", "c", "q")
    longer = {name: exchange("p", "c", "q", last) for name, last in (("chosen", "a"), ("rejected", "b"))}
    assert to_pair({"prompt": "p"} | longer).prompt == exchange("p", "c", "q")


def test_the_turns_of_a_transcript_are_the_prompt_up_to_its_last_answer():
    before = "\n\nHuman: q1\nmore\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: "
    pair = to_pair({"chosen": before + "a", "rejected": before + "b"})
    assert pair == PreferencePair(exchange("q1\nmore", "a1", "q2"), "a", "b")


@pytest.mark.parametrize("name, n", [("dpo_en_demo.json", 299), ("dpo_zh_demo.json", 300)])
def test_real_pairs_are_read_almost_whole(shared, name, n):
    broken = []
    pairs = list(read_files(shared / "dpo" / name, broken, to_pair, "pair of answers"))
    assert len(pairs) + len(broken) == n and len(broken) < 5
    assert any(pair.prompt[0]["role"] == "system" for pair in pairs)


# --- broken records


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["q", "a"], "the record should be an object .*, found list"),
        ("q", "the record should be an object .*, found str"),
        ({}, r"its keys are \(none\)"),
        ({"prompt": "q"}, "no question and answer .*; its keys are prompt"),
        ({"prompt": "q", "answer": ""}, r"message 1 \(assistant\) should not be empty, found ''"),
        ({"prompt": "q", "answer": " \n"}, r"message 1 \(assistant\) should not be empty"),
        ({"question": "q", "answer": None}, r"string as content, found .*None"),
        ({"question": "q", "answer": 3}, r"string as content, found .*3"),
        ({"instruction": "", "input": "", "output": "a"}, r"message 0 \(user\) should not be empty"),
        ({"question": "q", "answer": "a\ud800"}, r"message 1 \(assistant\) is not UTF-8"),
        ({"messages": []}, "at least one message"),
        ({"conversations": []}, "at least one message"),
        ({"messages": exchange("q")}, "has no answer"),
        ({"messages": [{"role": "system", "content": "s"}, *exchange("q")]}, "has no answer"),
        ({"messages": ["q", "a"]}, "a turn should be an object with 'role' and 'content', found str"),
        ({"messages": [{"role": "user"}]}, "string as content, found .*None"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 0 should be of role system or user, found 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 0 should be of role"),
        ({"messages": exchange("q", "a")[::-1]}, "message 0 should be of role system or user, found 'assistant'"),
        ({"messages": exchange("q", "a")[:1] * 2}, "message 1 should be of role assistant, found 'user'"),
        (
            {"messages": [*exchange("q", "a"), {"role": "system", "content": "s"}]},
            "message 2 should be of role user or tool, found 'system'",
        ),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 0 should be"),
        ({"prompt": "q", "answer": "a", "response": "b"}, r"2 keys for its answer \(answer, response\)"),
        ({"prompt": "q", "question": "p", "answer": "a"}, r"2 keys for its question \(prompt, question\)"),
        ({"instruction": "q", "output": "a", "history": ["q", "a"]}, "history should be a list of pairs"),
        ({"messages": [{"role": "user", "content": "q", "loss": "no"}]}, "true, false, 1 or 0, found 'no'"),
        ({"text": " "}, r"message 0 \(text\) should not be empty"),
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


def test_conversations_of_a_python_file_that_yields_records(tmp_path):
    loader = tmp_path / "mine.py"
    loader.write_text(
        "def data_loader():\n    yield {'q': 'q', 'a': 'a'}\n    yield 7\n    yield {'q': 'q', 'a': 'b'}\n"
    )
    broken = []
    assert list(file_conversations(loader, broken)) == [exchange("q", "a"), exchange("q", "b")]
    assert [record.where for record in broken] == [f"{loader}:2"]


def test_what_a_reader_refuses_is_broken_with_its_place(tmp_path):
    def read(record: dict) -> list[dict]:
        messages = to_messages(record)
        if "two" in messages[0]["content"]:
            raise ValueError("no twos")
        return messages

    path, broken = write(tmp_path / "a.jsonl", GOOD), []
    assert list(read_files(path, broken, read, "usable answer")) == EXPECTED[:1]
    assert [(record.where, record.reason) for record in broken] == [(f"{path}:2", "no twos")]


@pytest.mark.parametrize(
    "name, n",
    [
        ("alpaca_en_demo.json", 999),
        ("alpaca_zh_demo.json", 1000),
        ("alpaca_zh_9k.json", 9244),
        ("crosswoz_val_multiturn.jsonl", 500),
        ("kdconv_dev_multiturn.jsonl", 450),
        ("medical_zh_1k.jsonl", 1000),
        ("sharegpt_zh_multiturn_1k.jsonl", 1000),
    ],
)
def test_real_files_are_read_without_a_word_on_their_form(shared, name, n):
    broken = []
    read = list(file_conversations(shared / "sft" / name, broken))
    assert len(read) + len(broken) == n and len(broken) <= n // 200


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
    for record, reason in zip(broken, ("not JSON", "found list", "should not be empty", "not UTF-8")):
        assert reason in record.reason


def test_files_without_an_answer_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": "q", "answer": ""}])
    with pytest.raises(ValueError, match=r"no usable answer in 2 records; the first, .*a.jsonl:1: .* no question"):
        list(file_conversations(path, []))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl has no usable answer in 0 records"):
        list(file_conversations(tmp_path / "empty.jsonl", []))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"expected .* json, jsonl, csv, tsv or parquet, found only plain text"):
        list(file_conversations(tmp_path / "a.txt", []))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(file_conversations(tmp_path / "nowhere.jsonl", []))


def test_pairs_and_conversations_are_told_apart(tmp_path):
    question = {"conversations": [{"from": "human", "value": "q"}]}
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}, question | {"chosen": "a", "rejected": "b"}]
    for record in pairs:
        with pytest.raises(ValueError, match="a pair of answers: use a preference objective"):
            to_messages(record)
    with pytest.raises(ValueError, match=r"expected the keys chosen and rejected, found q, a; .* --objective sft"):
        to_pair({"q": "q", "a": "a"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in pairs))

    def read(record):
        if to_pair(record).rejected == "b":
            raise ValueError("not b")

    broken = []
    with pytest.raises(ValueError, match="has no pair of answers in 2 records"):
        list(read_files(path, broken, read, "pair of answers"))
    assert [record.reason for record in broken] == ["not b"] * 2

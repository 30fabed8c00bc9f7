"""Turns with calls, thoughts, parts and masks against the messages they stand for; no key is lost in silence."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from helpers.character_template import exchange
from helpers.tiny_chat_model import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.conversations import (
    ANSWERS,
    LISTS,
    MEDIA,
    QUESTIONS,
    RATINGS,
    SYSTEM,
    PreferencePair,
    file_conversations,
    to_messages,
    to_pair,
    to_prompt,
)
from chat.conversations import PAIRS as PAIR_KEYS
from chat.samples import PAIRS, read_samples
from chat.show import marked
from chat.template import load_template
from chat.turns import CONTENT, LOSS, ROLES, THOUGHT, TOOLS, WHO, Fields
from files import write_json_lines

SCHEMA = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"name": "add", "arguments": {"a": 2}}
CALLED = {"type": "function", "function": CALL}
ASKED, RESULT, LAST = {"role": "user", "content": "2+3?"}, {"role": "tool", "content": "5"}, exchange("", "It is 5.")[1]
ANSWER = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
AGENT = [ASKED | {"tools": [TOOL]}, ANSWER, RESULT, LAST]

OPENAI_CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 2}'}}


def sharegpt(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": who, "value": text} for who, text in turns]


@pytest.mark.parametrize("result", ["observation", "tool", "function", "ipython"])
@pytest.mark.parametrize("tools", [json.dumps([SCHEMA]), [SCHEMA], [TOOL], json.dumps([TOOL])])
def test_calls_and_results_of_sharegpt(result, tools):
    call = ("function_call", json.dumps(CALL))
    turns = sharegpt(("human", "2+3?"), call, (result, "5"), ("gpt", "It is 5."))
    assert to_messages({"conversations": turns, "tools": tools}) == AGENT
    assert to_messages({"tools": "", "conversations": turns}) == [ASKED, *AGENT[1:]]


def test_a_call_after_a_thought_and_several_calls_in_one_turn():
    several = sharegpt(("human", "2+3?"), ("function_call", f"<think>\nAdd.\n</think>\n\n{json.dumps([CALL, CALL])}"))
    expected = {"content": "<think>\nAdd.\n</think>", "tool_calls": [CALLED, CALLED]}
    assert to_messages({"conversations": several}) == [ASKED, {"role": "assistant"} | expected]


def test_calls_and_results_of_openai():
    result = {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "add"}
    turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]}, result, LAST]
    called = {"role": "assistant", "content": "", "tool_calls": [OPENAI_CALL]}
    assert to_messages({"messages": turns, "tools": [TOOL]}) == [AGENT[0], called, result, LAST]
    older = [ASKED, {"role": "assistant", "function_call": CALL}, result | {"role": "function"}, LAST]
    assert to_messages({"messages": older, "functions": [SCHEMA]}) == [AGENT[0], ANSWER, result, LAST]


def test_the_form_of_minimind():
    empty = {"reasoning_content": "", "tools": None, "tool_calls": None}
    turns = [
        {"role": "system", "content": "", **empty, "tools": json.dumps([TOOL])},
        ASKED | empty,
        {"role": "assistant", "content": "", **empty, "tool_calls": json.dumps([CALL]), "reasoning_content": "Add."},
        RESULT | empty,
        LAST | empty,
    ]
    expected = [AGENT[0], ANSWER | {"reasoning_content": "Add."}, RESULT, LAST]
    left_out = set()
    assert to_messages({"conversations": turns}, left_out) == expected and not left_out
    turns[0]["content"] = "S"
    system = {"role": "system", "content": "S", "tools": [TOOL]}
    assert to_messages({"conversations": turns}) == [system, ASKED, *expected[1:]]


def test_the_parts_of_llama_factory_v1():
    def turn(role: str, *parts: tuple[str, str], weight: float = 1.0) -> dict:
        return {"role": role, "content": [{"type": kind, "value": v} for kind, v in parts], "loss_weight": weight}

    turns = [
        turn("user", ("text", "2+"), ("text", "3?"), weight=0.0),
        turn("assistant", ("reasoning", "Add."), ("tool_call", json.dumps(CALL)), weight=0.0),
        turn("tool", ("text", "5"), weight=0.0),
        turn("assistant", ("text", "It is 5.")),
    ]
    masked = ANSWER | {"reasoning_content": "Add.", "loss": False}
    record = {"messages": turns, "tools": json.dumps([SCHEMA])}
    assert to_messages(record) == [AGENT[0], masked, RESULT, LAST]
    last = {"rejected_messages": [*turns[:-1], turn("assistant", ("text", "6"))], "chosen_messages": turns}
    pair = to_pair(last | {"tools": record["tools"]})
    assert pair == PreferencePair([AGENT[0], masked, RESULT], "It is 5.", "6")


@pytest.mark.parametrize("kind", ["image_url", "image", "video_url", "input_audio", "audio"])
def test_images_and_sound_are_refused_by_name(kind):
    parts = [{"type": "text", "text": "what?"}, {"type": kind, kind: "x.png"}]
    with pytest.raises(ValueError, match=f"a part of type '{kind}': only text is trained"):
        to_messages({"messages": [{"role": "user", "content": parts}, LAST]})
    key = kind.partition("_")[0].removeprefix("input")
    for name in {key, f"{key}s"} - {"", "s"}:
        with pytest.raises(ValueError, match=f"the record has {name}: only text is trained"):
            to_messages({"conversations": exchange("<image>what?", "a"), name: ["x.png"]})
        assert to_messages({"conversations": exchange("what?", "a"), name: []}) == exchange("what?", "a")


@pytest.mark.parametrize("key", LOSS)
@pytest.mark.parametrize("off", [False, 0, 0.0])
def test_every_name_of_a_mask(key, off):
    turns = [message | {key: not off} for message in exchange("q", "a", "p", "b")]
    turns[1][key], turns[2][key] = off, off  # the user's turns are never trained
    expected = exchange("q", "a", "p", "b")
    expected[1]["loss"] = False
    assert to_messages({"messages": turns}) == expected


def test_turns_without_roles():
    kdconv = [{"message": text, "attrs": [{"attrname": "年份"}]} for text in ("q", "a", "p", "b", "r")]
    left_out = set()
    assert to_messages({"messages": kdconv, "name": "江上"}, left_out) == exchange("q", "a", "p", "b")
    assert left_out == {
        "`name`, which is not used",
        "turns with `attrs`, which is not used",
        "a last question or result without an answer, which is left out",
    }
    moss = [{"human": "q", "assistant": "a"}, {"human": "p", "assistant": "b"}]
    assert to_messages({"conversation": moss}) == exchange("q", "a", "p", "b")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2093, "2093"),
        (0, "0"),
        (1.5, "1.5"),
        (True, "true"),
        (False, "false"),
        ({"x": 171, "名": None}, '{"x": 171, "名": null}'),
        (["plum", "枣"], '["plum", "枣"]'),
    ],
)
def test_alpaca_fields_that_are_no_texts_are_kept_as_json(value, text):
    for key in ("input", "context"):
        assert to_messages({"instruction": "i", key: value, "output": "a"}) == exchange(f"i\n{text}", "a")
    assert to_messages({"instruction": value, "output": "a"}) == exchange(text, "a")
    with pytest.raises(ValueError, match="string as content"):
        to_messages({"instruction": "i", "output": value})


def test_toyhom_and_prompts_that_are_lists():
    left_out = set()
    row = {"department": "内科", "title": "头痛", "ask": "q", "answer": "a"}
    assert to_messages(row, left_out) == exchange("q", "a")
    assert left_out == {"`department`, which is not used", "`title`, which is not used"}
    assert to_messages({"prompt": exchange("q"), "completion": exchange("q", "a")[1:]}) == exchange("q", "a")
    assert to_messages({"system_prompt": "s", "question": "q", "response": "a"})[0]["content"] == "s"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": exchange("q", "a"), "label": False}, "one of KTO, because its label says .* --objective dpo"),
        ({"prompt": "q", "completion": "a", "label": True}, "keep the records where it is true, without label"),
        ({"instruction": "q", "output": "a", "kto_tag": "True"}, "because its kto_tag says"),
        ({"messages": [ASKED, ANSWER | {"tool_calls": "{"}]}, "a call should be an object, a list, or the JSON text"),
        ({"messages": [ASKED, ANSWER | {"tool_calls": [{"a": 1}]}]}, 'an object with "name" and "arguments"'),
        ({"conversations": sharegpt(("human", "q"), ("function_call", "add 2"))}, "a call should be .* JSON"),
        ({"messages": exchange("q", "a"), "tools": "none"}, "tools should be an object, a list, or the JSON text"),
        ({"messages": exchange("q", "a"), "tools": ["add"]}, "tools should be a list of JSON schemas"),
        ({"messages": [ASKED | {"tools": [TOOL]}, LAST], "tools": [SCHEMA | {"name": "b"}]}, "tools in several places"),
        ({"messages": [ASKED, LAST | {"reasoning_content": 3}]}, "reasoning_content should be a string"),
        ({"messages": [ASKED, LAST | {"reasoning_content": "\ud800"}]}, r"message 1 \(assistant\) is not UTF-8"),
        ({"messages": [ASKED | {"content": [{"type": "text"}]}, LAST]}, "a part of type 'text' should have a text"),
        (
            {"kind": "x", "target": "y"},
            "its keys are kind, target. Expected a list of turns under mes.*; or text",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_with_what_to_do(record, reason):
    with pytest.raises(ValueError, match=reason):
        to_messages(record)


def test_a_label_that_is_a_class_is_only_named():
    left_out = set()
    assert to_messages({"question": "q", "answer": "a", "label": 1}, left_out) == exchange("q", "a")
    assert left_out == {"`label`, which is not used"}


def test_pairs_keep_thoughts_calls_and_say_what_they_do_not_use():
    left_out = set()
    record = {"conversations": [ASKED], "chosen": LAST | {"reasoning_content": "Add."}, "rejected": "4", "score": 0.5}
    pair = to_pair(record, left_out)
    assert pair.conversations()[0] == [ASKED, LAST | {"reasoning_content": "Add."}]
    assert left_out == {"`score`, which is not used"}
    record = {"prompt": "another", "messages": exchange("q", "c"), "chosen": exchange("q", "a"), "rejected": "b"}
    to_pair(record, left_out := set())
    assert left_out == {"an answer beside the two of the pair, which is not used", "`prompt`, which is not used"}
    to_pair({"prompt": "p", "chosen": exchange("q", "a"), "rejected": exchange("q", "b")}, left_out := set())
    assert left_out == {"a prompt beside answers that are whole conversations, which is not used"}


SHARED = exchange("q", "a")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": SHARED},
        {"messages": SHARED[:1]},
        {"instruction": "q", "input": ""},
        {"instruction": "q", "output": "a"},
        {"prompt": "q"},
        {"question": "q", "answer": None},
        {"ask": "q", "answer": "a"},
        {"prompt": [SHARED[0]]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": SHARED, "rejected": exchange("q", "b")},
        {"messages": [{"message": "q"}, {"message": "a"}]},
    ],
)
def test_what_a_model_is_asked(record):
    assert to_prompt(record) == SHARED[:1]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "t"}, "no question under names known here; its keys are text"),
        ({"title": "t"}, "no question under names known here; its keys are title"),
        ({"prompt": " "}, r"message 0 \(user\) should not be empty"),
        ([1], "should be an object with named fields, found list"),
    ],
)
def test_what_no_model_can_be_asked(record, reason):
    with pytest.raises(ValueError, match=reason):
        to_prompt(record)


KEYS = ("messages", "prompt", "answer", "instruction", "input", "output", "system", "history", "title", "id", "x")
VALUES = st.none() | st.text("ab", max_size=2) | st.integers(0, 2) | st.booleans() | st.just([]) | st.just({"x": 1})


@settings(max_examples=300, deadline=None)
@given(record=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5), more=VALUES)
def test_every_value_of_a_record_is_in_its_messages_or_named(record, more):
    """A value that is neither in a message nor named is lost: the words of each value are looked for."""
    record = {key: f"{key}{value}" if isinstance(value, str) and value else value for key, value in record.items()}
    left_out: set[str] = set()
    try:
        messages = to_messages(record | {"more": more}, left_out)
    except ValueError:
        return
    shown = json.dumps([message["content"] for message in messages], ensure_ascii=False)
    for key, value in (record | {"more": more}).items():
        if value not in (None, "", [], {}) or (isinstance(value, int) and not isinstance(value, bool)):
            written = value if isinstance(value, str) else json.dumps(json.dumps(value))[1:-1]
            assert written in shown or f"`{key}`, which is not used" in left_out, (key, value, messages)


TURN_KEYS = (*CONTENT, "role", "from", "id", "reasoning_content", "name", "mood")


@settings(max_examples=300, deadline=None)
@given(turn=st.dictionaries(st.sampled_from(TURN_KEYS), st.none() | st.just(""), max_size=5), data=st.data())
def test_every_value_of_a_turn_is_in_its_message_or_named(turn, data):
    turn = {key: data.draw(st.sampled_from([value, f"{key}!"])) for key, value in turn.items()}
    turn |= {key: "gpt" for key in ("role", "from") if key in turn} or {"role": "gpt"}
    left_out: set[str] = set()
    try:
        messages = to_messages({data.draw(st.sampled_from(LISTS)): [*exchange("q"), turn]}, left_out)
    except ValueError:
        return
    for key, value in turn.items():
        if value and value != "gpt":
            assert value in messages[1].values() or f"turns with `{key}`, which is not used" in left_out


def test_the_docs_list_every_key_that_is_read():
    page = Path(__file__).parents[1].joinpath("docs/finetuning.md").read_text(encoding="utf8")
    table = page.partition("## Accepted records")[2].partition("\n## ")[0]
    keys = {*LISTS, *QUESTIONS, *ANSWERS, *SYSTEM, *MEDIA, *RATINGS, *chain(*PAIR_KEYS), *WHO, *CONTENT, *THOUGHT}
    keys |= {*TOOLS, *LOSS, *ROLES, "instruction", "context", "history", "tool_calls", "name", "tool_call_id"}
    assert {key for key in keys if f"`{key}`" not in table} == set()


def test_a_record_remembers_what_was_read():
    fields = Fields({"a": 1, "b": None, "c": "", "d": 0, "e": []})
    assert fields.unread() == ["a", "d"] and "a" in fields and fields.has("d")
    assert fields["a"] == 1 and fields.get("d") == 0 and fields.unread() == []
    assert Fields({"a": None, "b": ""}).first(("x", "a", "b")) is None
    assert Fields({"a": None, "b": "", "c": 0}).first(("a", "b", "c")) == 0


# --- through a template


def test_calls_are_trained_results_are_not_and_what_is_not_rendered_is_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = sharegpt(("human", "2+3?"), ("function_call", json.dumps(CALL)), ("observation", "5"), ("gpt", "It is 5."))
    openai = [ASKED, ANSWER, RESULT | {"tool_call_id": "c1"}, LAST | {"reasoning_content": "T"}]
    records = [{"conversations": turns, "tools": json.dumps([SCHEMA])}, {"messages": openai, "id": 7}, {"messages": 3}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = chat_tokenizer(tmp_path)
    broken, left_out = [], Counter()
    samples = read_samples(path, load_template(tokenizer), 2000, broken=broken, left_out=left_out)
    text = marked(tokenizer, samples.ids[: samples.offsets[1]], samples.mask[: samples.offsets[1]], colour=False)
    assert text == (
        f"<s><|system|><tools>\n{json.dumps(TOOL)}\n</tools><|end|><|user|>2+3?<|end|>"
        f"<|assistant|>⟦<tool_call>\n{json.dumps(CALL)}\n</tool_call><|end|>⟧"
        "<|user|><tool_response>\n5\n</tool_response><|end|><|assistant|>⟦It is 5.<|end|>⟧"
    )
    assert len(broken) == 1  # and is not counted below
    assert left_out == {
        "`tool_call_id`, which the template does not render": 1,
        "`id`, which is not used": 1,
    }
    path.write_text(json.dumps({"messages": [ASKED, LAST | {"reasoning_content": "T"}]}) + "\n")
    read_samples(path, load_template(tokenizer, "plain"), 2000, left_out=(left_out := Counter()))
    assert left_out == {"`reasoning_content`, which the template does not render": 1}
    pair = {"prompt": "q", "chosen": LAST | {"reasoning_content": "T"}, "rejected": "b"}
    path.write_text(json.dumps(pair) + "\n")
    read_samples(path, load_template(tokenizer, "plain"), 99, kind=PAIRS, left_out=(left_out := Counter()))
    assert left_out == {"`reasoning_content`, which the template does not render": 1}


# --- odd keys and files


@pytest.mark.parametrize("encoding", ["gbk", "gb18030"])
def test_a_table_in_gbk_is_named_with_the_command_that_converts_it(tmp_path, encoding):
    path = tmp_path / "内科.csv"
    rows = "department,title,ask,answer\n内科,头痛,头痛怎么办？,多休息。\n内科,,发热吃什么药？,请去医院。\n"
    path.write_bytes(rows.encode(encoding))
    with pytest.raises(ValueError, match=r"no usable answer in 2 records.*looks like GBK or GB18030.*iconv -f gb18030"):
        list(file_conversations(path, []))
    path.write_bytes(rows.encode(encoding).decode(encoding).encode())
    expected = [exchange("头痛怎么办？", "多休息。"), exchange("发热吃什么药？", "请去医院。")]
    assert list(file_conversations(path, [])) == expected
    path.write_bytes("问题,回答\n甲,乙\n".encode(encoding))  # keys that nobody knows
    with pytest.raises(ValueError, match=r"its keys are .* looks like GBK or GB18030"):
        list(file_conversations(path, []))


def test_odd_keys_and_values_are_used_named_or_kept_aside(tmp_path):
    path, broken, left_out = tmp_path / "a.jsonl", [], Counter()
    lines = [
        '{"\\ud800": 1}',
        '{"q": "q", "a": "a", "\\ud800": NaN}',
        '{"q": "q\\udc00", "a": "a"}',
        '{"q": Infinity, "a": 1}',
    ]
    path.write_text("\n".join(lines))
    samples = read_samples(path, load_template(chat_tokenizer(tmp_path)), 99, broken=broken, left_out=left_out)
    assert len(samples) == 1 and left_out == {"`\\ud800`, which is not used": 1}
    write_json_lines(tmp_path / "aside.jsonl", map(vars, broken))
    aside = [json.loads(line) for line in (tmp_path / "aside.jsonl").read_text().splitlines()]
    assert [record["where"] for record in aside] == [f"{path}:{n}" for n in (1, 3, 4)]
    assert r"its keys are \ud800 - not UTF-8" in aside[0]["reason"] and "found" in aside[2]["reason"]
    assert aside[1]["reason"] == "message 0 (user) is not UTF-8 at character 2"

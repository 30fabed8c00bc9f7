"""Calls of tools and JSON schemas: what is found in an answer, and what an answer is held to."""

import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import torch
from helpers.server import served
from helpers.tiny_chat_model import save_chat_model

from serving import service
from serving.tools import certain, split_calls

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "天气如何"}], "max_tokens": 150}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "江州"}}\n</tool_call>'
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["李白", "杜甫"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(save_chat_model(tmp_path_factory.mktemp("model"), max_seq_len=500)) as server:
        yield server


def forced(server, monkeypatch, text: str) -> None:
    """Let every answer be this text."""
    own = server.service.assistant
    ids = [*own.tokenizer.encode(text), min(own.template.stop_ids)]

    def adjust(logits: torch.Tensor, answer) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([ids[len(answer)]]), 0.0)

    monkeypatch.setattr(service, "penalties", lambda *_: adjust)


# ---- calls


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("晴天", "晴天", []),
        (CALL, "", [("weather", {"city": "江州"})]),
        (f" 我查一下。\n\n{CALL}\n{CALL}", " 我查一下。", [("weather", {"city": "江州"})] * 2),
        ('<tool_call>{"name": "f", "arguments": {"a": "</b>", "n": [{}]}}', "", [("f", {"a": "</b>", "n": [{}]})]),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', "", [("f", {}), ("g", {})]),
        ('{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
        ('{"name": "f"}', '{"name": "f"}', []),
        ('{"answer": 1}', '{"answer": 1}', []),
        ("<tool_call>{half", "<tool_call>{half", []),
        ("[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
        (f"{CALL}<tool_call>{{", f"{CALL}<tool_call>{{", []),
    ],
)  # fmt: skip
def test_calls_in_a_text(text, content, calls):
    found, parsed = split_calls(text)
    assert (found, [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in parsed]) == (
        content,
        calls,
    )
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in parsed)
    for n in range(len(text) + 1):  # what is told early is never taken back
        assert found.startswith(text[: certain(text[:n])])


def test_answers_with_tools(server, monkeypatch):
    pieces = ("我查。\n", CALL, "晴天。")
    for text, content, ended in (
        (pieces[0] + pieces[1], "我查。", "tool_calls"),
        (pieces[1], None, "tool_calls"),
        (pieces[2], "晴天。", "stop"),
    ):
        forced(server, monkeypatch, text)
        status, _, answer = server.ask(CHAT, ASK | {"tools": [TOOL]})
        choice = answer["choices"][0]
        assert status == 200 and choice["message"]["content"] == content and choice["finish_reason"] == ended
        deltas = [event["choices"][0] for event in server.events(CHAT, ASK | {"tools": [TOOL]})]
        assert "".join(each["delta"].get("content") or "" for each in deltas) == (content or "")
        assert deltas[-1]["finish_reason"] == ended and deltas[-1]["delta"] == {}
        told = [call for each in deltas for call in each["delta"].get("tool_calls", [])]
        for calls in (choice["message"].get("tool_calls", []), told):
            assert [call["function"] for call in calls] == (
                [{"name": "weather", "arguments": '{"city": "江州"}'}] if ended == "tool_calls" else []
            )
        assert [call["index"] for call in told] == list(range(len(told)))


def test_tools_and_calls_enter_the_prompt(server, monkeypatch):
    own = server.service.assistant
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "江州"}'}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "晴"},
    ]
    forced(server, monkeypatch, "晴天。")
    _, _, answer = server.ask(CHAT, ASK | {"messages": messages, "tools": [TOOL]})
    as_object = {**call, "function": {"name": "weather", "arguments": {"city": "江州"}}}
    trained = [
        {**messages[0], "tools": [TOOL]},
        {"role": "assistant", "tool_calls": [as_object]},
        messages[2],
    ]
    assert answer["usage"]["prompt_tokens"] == len(own.encode(trained))
    _, _, without = server.ask(CHAT, ASK | {"tools": [TOOL], "tool_choice": "none"})
    assert without["usage"]["prompt_tokens"] == len(own.encode(ASK["messages"]))


@pytest.mark.parametrize(
    "tool", [{}, {"type": "function"}, {"function": {}}, {"function": {"name": ""}}, {"function": 1}]
)
def test_a_tool_without_a_name_is_refused(server, tool):
    sentence = "tools.1.function.name is missing: an answer names the function that it calls"
    assert server.error(CHAT, ASK | {"tools": [TOOL, tool]}) == (400, sentence)


def test_a_template_without_tools_refuses_them(tmp_path):
    directory = save_chat_model(tmp_path)
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf8"))
    settings["chat_template"] = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf8")
    with served(directory) as server:
        sentence = "the chat template of tiny has no tools: leave them out"
        assert server.error(CHAT, ASK | {"tools": [TOOL]}) == (400, sentence)
        for none in ({"tools": []}, {"tools": [TOOL], "tool_choice": "none"}):  # clients send an empty list
            assert server.ask(CHAT, ASK | none)[0] == 200


# ---- JSON


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_keep_a_json_schema(server, temperature):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    body = ASK | {"temperature": temperature, "response_format": form, "n": 3, "seed": 5, "presence_penalty": 0.5}
    _, _, answer = server.ask(CHAT, body)
    for choice in answer["choices"]:
        person = json.loads(choice["message"]["content"])
        assert choice["finish_reason"] == "stop" and set(person) == {"name", "age"}
        assert person["name"] in ("李白", "杜甫") and 1 <= person["age"] <= 99
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1 or temperature == 0
    events = server.events(CHAT, body | {"n": 1})
    assert (
        "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        == answer["choices"][0]["message"]["content"]
    )


def test_any_json_object_and_what_is_cut(server):
    pytest.importorskip("llguidance")
    body = ASK | {"response_format": {"type": "json_object"}, "temperature": 0.8, "seed": 1, "logit_bias": {}}
    _, _, answer = server.ask(CHAT, body | {"max_tokens": 3})
    assert answer["choices"][0]["message"]["content"].startswith("{")
    assert answer["choices"][0]["finish_reason"] == "length"  # not whole, and so it says


def test_a_schema_that_cannot_be_kept_is_refused(server, monkeypatch):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}}
    status, message = server.error(CHAT, ASK | {"response_format": form})
    assert status == 400 and "this schema cannot be kept" in message


def test_without_the_package_it_says_what_to_install(server, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    status, message = server.error(CHAT, ASK | {"response_format": {"type": "json_object"}})
    assert status == 400 and "bash setup.sh --extra serve" in message


def test_an_error_before_a_draw_ends_its_request_alone(server, monkeypatch):
    def broken(logits, answer):
        raise KeyError("a mistake")

    monkeypatch.setattr(service, "penalties", lambda request, _: broken if request.seed == 13 else None)
    assert server.error(CHAT, ASK | {"seed": 13}) == (500, "decoding failed: 'a mistake'")
    assert server.ask(CHAT, ASK | {"seed": 14})[0] == 200

"""Clients that others wrote: curl, LangChain's OpenAI chat model, and what Open WebUI asks one after the other."""

import json
import shutil
import subprocess

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from helpers.server import served
from helpers.tiny_chat_model import save_chat_model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "举头望明月"}], "temperature": 0, "max_tokens": 9}
KEY = "secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(save_chat_model(tmp_path_factory.mktemp("model"), max_seq_len=1000), api_key=KEY) as server:
        yield server


def answer_of(server, path: str = CHAT, body: dict = ASK) -> dict:
    status, _, answer = server.ask(path, body, Authorization=f"Bearer {KEY}")
    assert status == 200, answer
    return answer["choices"][0]


# ---- curl


def curl(server, path: str, *flags: str, body: dict | None = None) -> str:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    data = [] if body is None else ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    command = ["curl", "-sS", "--max-time", "60", *flags, *data, server.url + path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_curl(server):
    key = ("-H", f"Authorization: Bearer {KEY}")
    text = answer_of(server)["message"]["content"]
    assert json.loads(curl(server, CHAT, *key, body=ASK))["choices"][0]["message"]["content"] == text
    lines = curl(server, CHAT, "-N", *key, body=ASK | {"stream": True}).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    answer = curl(server, TEXT, *key, body={"prompt": "床前", "max_tokens": 0, "echo": True, "logprobs": 1})
    assert json.loads(answer)["choices"][0]["text"] == "床前"
    refused = curl(server, CHAT, "-w", "%{http_code}", body=ASK)
    assert refused.endswith("401") and '"code": "invalid_api_key"' in refused
    assert "<!doctype html>" in curl(server, "/") and "ok" in curl(server, "/health")


# ---- LangChain


@pytest.fixture
def chat_model(server, monkeypatch):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")  # nothing is sent elsewhere
    settings = {
        "model": "tiny",
        "base_url": f"{server.url}/v1",
        "api_key": KEY,
        "temperature": 0,
        "max_tokens": 9,
        "max_retries": 0,
    }
    return lambda **more: langchain.ChatOpenAI(**settings | more)


def test_langchain_chats_and_streams(server, chat_model):
    model, text = chat_model(), answer_of(server)["message"]["content"]
    answer = model.invoke("举头望明月")
    assert answer.content == text and answer.usage_metadata["output_tokens"] <= 9
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    chunks = list(model.stream([("user", "举头望明月")]))
    assert len(chunks) > 1 and "".join(chunk.content for chunk in chunks) == text
    several = model.batch(["床前", "举头望明月"])
    assert several[1].content == text
    following = [("system", "诗"), ("user", "举头望明月"), ("assistant", "好"), ("user", "再来")]
    messages = [{"role": role, "content": content} for role, content in following]
    assert model.invoke(following).content == answer_of(server, body=ASK | {"messages": messages})["message"]["content"]


def test_langchain_gets_stops_choices_log_probabilities_and_schemas(server, chat_model):
    text = answer_of(server)["message"]["content"]
    stop = next(letter for letter in text[1:] if letter != "\ufffd")  # half characters have no text
    assert chat_model().invoke("举头望明月", stop=[stop]).content == text[: text.index(stop)]
    found = chat_model(logprobs=True, top_logprobs=2).invoke("举头望明月").response_metadata["logprobs"]["content"]
    assert found == answer_of(server, body=ASK | {"logprobs": True, "top_logprobs": 2})["logprobs"]["content"]
    message = pytest.importorskip("langchain_core.messages").HumanMessage("月")
    result = chat_model(n=3, temperature=1, seed=1).generate([[message]])
    assert len(result.generations[0]) == 3
    schema = {
        "title": "Pick",
        "type": "object",
        "properties": {"line": {"enum": ["明月", "故乡"]}},
        "required": ["line"],
    }
    pick = chat_model(max_tokens=200).with_structured_output(
        schema | {"additionalProperties": False}, method="json_schema"
    )
    assert pick.invoke("月")["line"] in ("明月", "故乡")


def test_langchain_understands_errors(server, chat_model):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="tokens long, the model takes 1000"):
        chat_model().invoke("月" * 1100)
    with pytest.raises(openai.AuthenticationError):
        chat_model(api_key="wrong").invoke("月")
    with pytest.raises(openai.NotFoundError, match="there is tiny"):
        chat_model(model="gpt-4").invoke("月")


# ---- Open WebUI


def test_what_open_webui_asks_one_after_the_other(server):
    """The list of models, a streamed answer with its own fields, then a title for the conversation in JSON."""
    _, _, listed = server.ask("/v1/models", Authorization=f"Bearer {KEY}")
    name = listed["data"][0]["id"]
    body = ASK | {"model": name, "stream": True, "stream_options": {"include_usage": True}, "chat_id": "1", "tools": []}
    status, _, text = server.ask(CHAT, body | {"session_id": "x", "metadata": {}}, Authorization=f"Bearer {KEY}")
    assert status == 200 and '"usage":{' in text and text.endswith("data: [DONE]\n\n")
    history = json.dumps([*ASK["messages"], {"role": "assistant", "content": "好"}], ensure_ascii=False)
    title = {"model": name, "messages": [{"role": "user", "content": f"Title in JSON for: {history}"}], "stream": False}
    answer = answer_of(server, body=title | {"max_completion_tokens": 50, "metadata": {"task": "title_generation"}})
    assert isinstance(answer["message"]["content"], str)

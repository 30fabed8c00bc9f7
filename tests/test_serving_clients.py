"""Clients of all kinds: the official one, those that go away, those that should not come in, and too many of them."""

import asyncio
import concurrent.futures
import contextlib
import json
import random
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from helpers.server import served
from helpers.tiny_chat_model import save_chat_model

from serving import api, api_reply

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "月", "max_tokens": 2900, "ignore_eos": True}
SHORT = {"prompt": "床前明月光", "temperature": 0, "max_tokens": 5}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"), max_seq_len=3000)


@pytest.fixture(scope="module")
def server(directory):
    with served(directory, rows=2, queue=2) as server:
        yield server


@contextlib.contextmanager
def connected(server, body: dict, path: str = TEXT):
    """A request that is sent; its answer can be read from the socket, or not."""
    raw = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        yield connection


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- the official client


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_the_official_client_chats(client):
    messages = [{"role": "system", "content": "诗"}, {"role": "user", "content": "举头望明月"}]
    settings = {"model": "tiny", "messages": messages, "seed": 1, "max_completion_tokens": 8, "n": 2}
    answer = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2, stop=["霜"], user="me")
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.usage.prompt_tokens > 5
    texts = ["", ""]
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**settings, stop=["霜"], stream=True, stream_options=options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert chunk.usage.completion_tokens == answer.usage.completion_tokens
    assert texts == [choice.message.content for choice in answer.choices]
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


def test_the_official_client_completes_and_lists(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    answer = client.completions.create(model="tiny", prompt=["床前", "the moon"], echo=True, logprobs=2, max_tokens=0)
    assert [choice.text for choice in answer.choices] == ["床前", "the moon"]
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    chunks = list(client.completions.create(model="tiny", prompt="床前", max_tokens=4, temperature=0, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_the_official_client_understands_errors(client):
    openai = pytest.importorskip("openai")
    for kind, call in {
        openai.NotFoundError: lambda: client.completions.create(model="gpt-4", prompt="x"),
        openai.BadRequestError: lambda: client.completions.create(model="tiny", prompt="x", temperature=-1),
    }.items():
        with pytest.raises(kind) as error:
            call()
        assert error.value.param in ("model", "temperature")
    with pytest.raises(openai.BadRequestError, match="embeddings are not offered"):
        client.embeddings.create(model="tiny", input="x")


# ---- clients that go away, and too many of them


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["running", "waiting"])
def test_a_client_that_goes_away_frees_its_row_and_no_other(server, stream, when):
    engine, gone = server.service.engine, server.service.metrics.cancelled
    body, n_others = LONG | {"stream": stream}, 2 if when == "waiting" else 1
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(connected(server, LONG | {"stream": True, "seed": i})) for i in range(n_others)]
        until(lambda: engine.running == n_others)
        with connected(server, body) as connection:
            until(lambda: engine.running + engine.waiting == n_others + 1)
            if stream and when == "running":
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: engine.running + engine.waiting == n_others, 5)
        assert all(other.recv(100).startswith(b"HTTP/1.1 200") for other in others)
    server.wait_until_idle()
    assert server.service.metrics.cancelled == gone + n_others + 1
    assert server.ask(TEXT, SHORT)[0] == 200


def test_a_client_that_goes_away_while_its_prompt_is_read_frees_its_row(tmp_path):
    directory = save_chat_model(tmp_path, max_seq_len=3000, dim=128, n_layers=4, hidden_dim=512)
    with served(directory, rows=1, most=1) as server:  # one id of the prompt a step
        engine, metrics = server.service.engine, server.service.metrics
        with connected(server, {"prompt": "疑是地上霜" * 400, "max_tokens": 1, "stream": True}):
            until(lambda: engine.running == 1)
        until(lambda: engine.running == 0, 5)  # less than 1 s on a machine that does nothing else
        assert metrics.cancelled == 1 and engine.rows.free == 1
        assert server.ask(TEXT, SHORT)[0] == 200


def test_a_full_queue_says_when_to_come_again(server):
    with contextlib.ExitStack() as stack:
        engine = server.service.engine
        for n in range(4):
            stack.enter_context(connected(server, LONG))
            until(lambda n=n: engine.running == min(n + 1, 2) and engine.running + engine.waiting == n + 1)
        status, headers, answer = server.ask(TEXT, SHORT)
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert answer["error"]["type"] == "rate_limit_error" and answer["error"]["code"] == "busy"
        assert server.ask("/health")[0] == 200
    server.wait_until_idle()


def test_an_answer_that_runs_out_of_time_says_so(directory):
    with served(directory, rows=1, timeout=0.4) as server:
        assert server.error(TEXT, LONG) == (504, "the time for this request was over before its end")
        status, _, text = server.ask(TEXT, LONG | {"stream": True})
        assert status == 200 and '"code":"timeout"' in text and text.endswith("data: [DONE]\n\n")


def test_a_reader_that_takes_nothing_is_let_go(server, monkeypatch):
    monkeypatch.setattr(api_reply, "SECONDS_FOR_READER", 0.2)
    service, gone = server.service, server.service.metrics.cancelled
    request = api.CompletionRequest(**LONG, stream=True)

    async def never(*message: dict) -> None:
        if not message or message[0]["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def reply() -> None:
        made = api_reply.CompletionReply(service, request, service.completion(request), TEXT)
        made.submit()
        await made({}, never, never)

    asyncio.run_coroutine_threadsafe(reply(), service.engine._loop).result(30)
    server.wait_until_idle()
    assert service.metrics.cancelled == gone + 1


def test_bodies_that_do_not_come_or_are_too_large(server, monkeypatch):
    monkeypatch.setattr(api, "SECONDS_FOR_BODY", 0.2)
    monkeypatch.setattr(api, "MOST_BODY", 1 << 20)
    for head, status in (
        ("Content-Length: 100", b"408"),
        (f"Content-Length: {2 << 20}", b"413"),
        ("Transfer-Encoding: chunked", b"408"),
        ("no header at all", b"400"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode())
            assert connection.recv(100).split()[1] == status
    assert server.error(TEXT, b" " * (1 << 20) + b"{}")[0] == 413


VALUES = (None, True, 0, -1, 10**30, 0.5, "", "月", "<|end|>", "\ud800", {}, [], [None], {"type": "text"}, {"9": 1})


def test_any_value_of_any_field_is_an_answer_or_a_refusal(server):
    draw = random.Random(0)
    chat = {"messages": [{"role": "user", "content": "月"}], "max_tokens": 2}
    bodies = {CHAT: chat, TEXT: {"prompt": "月", "max_tokens": 2}, "/tokenize": {"prompt": "月"}, "/detokenize": {}}
    kinds = (api.ChatRequest, api.CompletionRequest, api.TokenizeRequest, api.DetokenizeRequest)
    for path, kind in zip(bodies, kinds):
        for field in kind.model_fields:
            for value in draw.sample(VALUES, 4):
                status, _, answer = server.ask(path, bodies[path] | {field: value})
                assert status in (200, 400, 404) and (status == 200 or set(answer) == {"error"}), (field, value)
    for key in ("role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content"):
        for value in VALUES:
            messages = [*chat["messages"], {"role": "assistant", "content": "好", key: value}, *chat["messages"]]
            assert server.ask(CHAT, chat | {"messages": messages})[0] in (200, 400)


def test_many_requests_some_of_them_bad_and_idle_connections(directory):
    """None is lost, every bad one is told so, nothing is left."""
    threads = threading.active_count()
    with served(directory, rows=4, queue=1000) as server, contextlib.ExitStack() as idle:
        for _ in range(30):
            idle.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        expected = server.ask(TEXT, SHORT)[2]["choices"]

        def one(i: int) -> bool:
            if i % 10 == 3:
                return server.error(TEXT, b'{"prompt": ')[0] == 400
            if i % 10 == 5:
                return server.error(TEXT, {"prompt": "月" * 20_000})[0] == 400
            if i % 10 == 7:
                with connected(server, LONG | {"stream": i % 20 == 7}):
                    return True
            return server.ask(TEXT, SHORT)[2]["choices"] == expected

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(one, range(200)))
        server.wait_until_idle()
        assert server.service.engine.rows.free == 4
    until(lambda: threading.active_count() <= threads + 1)


# ---- several models


def test_clients_choose_a_model_by_its_name(directory, tmp_path):
    other = save_chat_model(tmp_path, max_seq_len=100, dim=48)
    with served(directory, more={"other": other}) as server:
        assert [card["id"] for card in server.ask("/v1/models")[2]["data"]] == ["tiny", "other"]
        assert server.ask("/v1/models/other")[2]["max_model_len"] == 100
        first, second, third = (
            server.ask(TEXT, SHORT | body)[2] for body in ({}, {"model": "tiny"}, {"model": "other"})
        )
        assert first["choices"] == second["choices"] != third["choices"] and third["model"] == "other"
        assert server.error(TEXT, SHORT | {"model": "x"}) == (404, "there is no model 'x' here: there is tiny, other")
        assert server.ask("/tokenizer_info?model=other")[2]["model_max_length"] == 100
        assert "little_llama_rows 8" in server.ask("/metrics")[2]


# ---- who may come in


def test_the_key(directory):
    with served(directory, api_key="sésame") as server:
        for path in ("/v1/models", "/metrics", "/tokenizer_info"):
            assert server.ask(path)[0] == 401
            assert server.ask(path, Authorization="Bearer wrong")[0] == 401
        status, headers, answer = server.ask(TEXT, SHORT, Authorization="sesame")
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert answer["error"]["type"] == "authentication_error" and answer["error"]["code"] == "invalid_api_key"
        assert server.ask("/health")[0] == 200 and server.ask("/")[0] == 200
        key = "Bearer sésame".encode().decode("latin1")
        assert server.ask("/v1/models", Authorization=key)[0] == 200


def test_names_and_origins(server):
    for host in ("localhost:1", "127.0.0.1", "192.168.0.7:8000", "[::1]:80"):
        assert server.ask("/health", Host=host)[0] == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[evil"):
        assert server.error("/health", Host=host)[0] == 403
    assert server.error(TEXT, SHORT, Origin="https://evil.example") == (
        403,
        "pages of https://evil.example may not use this server: add the origin to --cors_origins",
    )
    assert server.error(TEXT, SHORT, Origin="null")[0] == 403
    status, headers, _ = server.ask(TEXT, SHORT, Origin=server.url)
    assert status == 200 and "access-control-allow-origin" not in headers


def test_pages_of_origins_that_are_named(directory):
    page = "https://page.example"
    with served(directory, origins=(page,), hosts=("my.box",), api_key="k") as server:
        asked = {"Origin": page, "Access_Control_Request_Method": "POST"}
        asked["Access_Control_Request_Headers"] = "authorization,content-type"
        status, headers, _ = server.ask(CHAT, method="OPTIONS", **asked)  # the preflight has no key
        assert status == 200 and headers["access-control-allow-origin"] == page
        assert "authorization" in headers["access-control-allow-headers"].lower()
        status, headers, _ = server.ask("/v1/models", Origin=page, Authorization="Bearer k", Host="my.box:8000")
        assert status == 200 and headers["access-control-allow-origin"] == page
        status, headers, _ = server.ask("/v1/models", Origin=page)
        assert status == 401 and headers["access-control-allow-origin"] == page  # so that the page can read why
        assert server.error("/v1/models", Origin="https://evil.example", Authorization="Bearer k")[0] == 403

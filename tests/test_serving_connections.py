"""Clients that speak no HTTP, or nothing at all."""

import json
import socket

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from helpers.server import served
from helpers.tiny_chat_model import save_chat_model

from serving import connections

GOOD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(save_chat_model(tmp_path_factory.mktemp("run") / "best")) as server:
        yield server


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def ask(connection: socket.socket) -> None:
    connection.sendall(GOOD)
    said = b""
    while b'"ok"' not in said:
        said += connection.recv(65536)
        assert said.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # as https begins
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 500_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=lambda raw: raw[:20].decode("latin1"),
)
@pytest.mark.parametrize("before", [False, True], ids=["first", "after a request"])
def test_what_is_no_http_gets_an_error_of_the_api(server, raw, before):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        if before:
            ask(connection)
        connection.sendall(raw)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-type: application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_a_body_that_breaks_off_ends_the_connection(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head + b"5\r\n12345\r\nno length\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")
    server.wait_until_idle()
    assert server.ask("/health")[0] == 200


def test_who_says_nothing_has_to_go(server, monkeypatch):
    monkeypatch.setattr(connections, "SECONDS_FOR_REQUEST", 0.3)
    for said in (b"", GOOD[:20]):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(said)
            assert read_all(connection) == b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        ask(connection)


def test_the_end_does_not_wait_for_a_connection_that_is_made_then(tmp_path):
    with served(save_chat_model(tmp_path / "best")) as server:
        server.uvicorn.server_state.closing = True  # as it is from SIGTERM on
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            assert read_all(connection) == b""

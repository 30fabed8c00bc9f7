"""A server on a real socket of this machine, and requests to it as any client may send them."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from decoding.fixed_rows import FixedRows
from decoding.params import SamplingParams
from serving import connections
from serving.api import make_app
from serving.assistant import load_assistant
from serving.engine import Engine
from serving.service import Service

DEFAULTS = SamplingParams(max_new_tokens=40)


class Server:
    """A server in a thread of this process; `service` is what it serves."""

    def __init__(
        self, directory: Path, rows: int = 4, queue: int = 64, timeout: float = 60, most=None, more=None, **guard
    ) -> None:
        more = more or {}

        def make(name: str, directory: Path) -> Service:
            assistant = load_assistant(directory, torch.device("cpu"), torch.float32)
            engine = Engine(FixedRows(assistant.model, rows, most=most), queue)
            return Service(name, assistant, engine, DEFAULTS, timeout)

        self.service = make("tiny", directory)
        app = make_app([self.service, *(make(*pair) for pair in more.items())], **guard)
        self.uvicorn = connections.Server(app, port=0, timeout_graceful_shutdown=9)
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive() and not self.service.engine.alive

    def ask(self, path: str, body=None, method: str | None = None, **headers: str):
        """Return status, headers and the JSON (or text) of the answer; body: JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        raw = body if isinstance(body, bytes | None) else json.dumps(body)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, raw, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = (response.getheader("content-type") or "").startswith("application/json")
        return response.status, dict(response.headers), json.loads(text) if is_json else text

    def error(self, path: str, body=None, **more) -> tuple[int, str]:
        """Return status and message of a request that is refused, whose error has the form of the API."""
        status, _, answer = self.ask(path, body, **more)
        assert status >= 400 and set(answer) == {"error"}, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]["message"]

    def events(self, path: str, body: dict) -> list[dict]:
        """Return the events of a stream, which ends as the API says."""
        status, headers, text = self.ask(path, body | {"stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        lines = text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def wait_until_idle(self) -> None:
        for _ in range(500):
            if not (self.service.engine.running or self.service.engine.waiting):
                return
            time.sleep(0.01)
        raise AssertionError("the engine still works")


@contextlib.contextmanager
def served(directory: Path, **options) -> Iterator[Server]:
    server = Server(directory, **options)
    try:
        yield server
    finally:
        server.close()

"""serve.py as a process: what it says at the start, what it refuses, how it ends."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from helpers.tiny_chat_model import save_chat_model

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("run") / "best", max_seq_len=3000)


def start(*flags: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "serve.py"), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment, cwd=REPOSITORY)


def ask(port: int, body: dict, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


@pytest.mark.parametrize(("streams", "signals"), [(False, 1), (True, 2)])
def test_sigterm_finishes_what_runs(directory, streams, signals):
    process = start("--model", str(directory), "--port", "0", "--rows", "2", LITTLE_LLAMA_API_KEY="secret")
    lines = [process.stderr.readline() for _ in range(2)]
    name, port = re.match(r"(.+), 0\.\d\d M parameters, at http://127\.0\.0\.1:(\d+)/v1", lines[0]).groups()
    assert name == directory.parent.name and re.match(r"2 texts of 3000 tokens together: at most 6\.", lines[1])
    body = {"prompt": "月", "max_tokens": 2500, "ignore_eos": True, "stream": streams}
    assert ask(int(port), body)[0] == 401
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(int(port), body, Authorization="Bearer secret")))
    asking.start()
    time.sleep(0.3)
    assert not answers  # it is under way
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
    asking.join(60)
    assert process.wait(30) == 0
    status, text = answers[0]
    assert status == 200 and '"finish_reason":"length"' in text and "secret" not in "".join(lines)
    assert text.endswith("data: [DONE]\n\n") or not streams
    assert process.stderr.read() == ""


def test_a_port_in_use_is_told_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start("--model", str(tmp_path), "--port", str(port))
        assert process.wait(60) == 1
    assert process.stderr.read().startswith(f"error: --port {port} at --host 127.0.0.1 cannot be used")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rows", "0"], "--rows should be at least 1, found 0"),
        (["--port", "70000"], "--port should be from 0 to 65535, found 70000"),
        (["--timeout", "0"], "--timeout should be above 0 seconds, found 0.0"),
        (["--api_key", " "], "--api_key is empty"),
        (
            ["--rows", "100000000", "--port", "0", "--model", "DIRECTORY"],
            "the cache of 100000000 rows of 3000 tokens needs",
        ),
        (["--model", "no/such", "--port", "0"], "no/such does not exist"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_in_one_sentence(directory, flags, sentence):
    process = start(*(str(directory) if flag == "DIRECTORY" else flag for flag in flags))
    assert process.wait(60) == 1
    assert process.stderr.read().startswith(f"error: {sentence}")

"""serve.py as a process: what it says at the start, what it refuses, how it ends."""

import contextlib
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

from serve import name_of

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("run") / "best", max_seq_len=3000)


def start(*flags: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "serve.py"), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment, cwd=REPOSITORY)


def ask(port: int, body: dict | None, path: str = "/v1/completions", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_sigterm_finishes_what_runs(directory):
    process = start("--model", str(directory), "--port", "0", "--rows", "2", LITTLE_LLAMA_API_KEY="secret")
    lines = [process.stderr.readline() for _ in range(3)]
    name, port = re.match(r"(.+), 0\.\d\d M parameters, at http://127\.0\.0\.1:(\d+)/v1", lines[0]).groups()
    assert name == directory.parent.name and re.match(r"2 texts of 3000 tokens together: at most 3\.1 MB", lines[1])
    assert lines[2] == f"a page to chat on: http://127.0.0.1:{port}\n"
    body = {"prompt": "月", "max_tokens": 1500, "ignore_eos": True}
    assert ask(int(port), body)[0] == 401
    answers = {}

    def one(stream: bool) -> None:
        answers[stream] = ask(int(port), body | {"stream": stream}, Authorization="Bearer secret")

    asking = [threading.Thread(target=one, args=(stream,)) for stream in (False, True)]
    for thread in asking:
        thread.start()
    while "requests_running 2" not in ask(int(port), None, "/metrics", Authorization="Bearer secret")[1]:
        time.sleep(0.01)
    assert not answers  # both are under way
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    for thread in asking:
        thread.join(60)
    assert process.wait(30) == 0 and process.stderr.read() == "" and "secret" not in "".join(lines)
    for stream, (status, text) in answers.items():
        assert status == 200 and '"finish_reason":"length"' in text
        assert text.endswith("data: [DONE]\n\n") == stream


def test_sigterm_does_not_wait_for_who_says_nothing(directory):
    process = start("--model", str(directory), "--port", "0")
    port = int(re.search(r"127\.0\.0\.1:(\d+)/v1", process.stderr.readline()).group(1))
    assert ask(port, None, "/health")[0] == 200
    silent, signalled = [], threading.Event()

    def open_many() -> None:
        with contextlib.suppress(OSError):
            while len(silent) < 3000 and process.poll() is None:
                silent.append(socket.create_connection(("127.0.0.1", port), timeout=5))
                if len(silent) == 200:
                    signalled.set()

    opening = threading.Thread(target=open_many)
    opening.start()
    assert signalled.wait(30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    opening.join()
    for connection in silent:
        connection.close()


def test_a_run_is_called_by_its_directory(tmp_path, monkeypatch):
    (tmp_path / "sft" / "step_00000600").mkdir(parents=True)
    (tmp_path / "sft" / "best").symlink_to("step_00000600")  # as training leaves it
    assert name_of(tmp_path / "sft" / "best") == name_of(tmp_path / "sft") == "sft"
    assert name_of(tmp_path / "sft" / "step_00000600") == "step_00000600"
    monkeypatch.chdir(tmp_path / "sft")
    assert name_of(Path("best")) == name_of(Path()) == "sft"


def test_a_port_in_use_is_told_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # before torch is imported, which takes seconds
        process = start("--model", str(tmp_path), "--port", str(port), PYTHONPROFILEIMPORTTIME="1")
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and not re.search(r"\| +torch\n", said)
    said = said[said.index("error: ") :]
    assert said.startswith(f"error: --port {port} at --host 127.0.0.1 cannot be used")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rows", "0"], "--rows should be at least 1, found 0"),
        (["--port", "70000"], "--port should be from 0 to 65535, found 70000"),
        (["--timeout", "0"], "--timeout should be above 0 seconds, found 0.0"),
        (["--api_key", " "], "--api_key is empty"),
        (
            ["--rows", "100000000", "--port", "0", "--model", "DIRECTORY"],
            "the cache of 100000000 rows",
        ),
        (["--model", "no/such", "--port", "0"], "no/such does not exist"),
        (
            ["--model", "DIRECTORY", "--port", "0", "--more", "x"],
            "--more expects NAME=DIRECTORY, each name once, found x",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_in_one_sentence(directory, flags, sentence):
    process = start(*(str(directory) if flag == "DIRECTORY" else flag for flag in flags))
    assert process.wait(60) == 1
    assert process.stderr.read().startswith(f"error: {sentence}")

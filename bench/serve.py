"""Measure the server under load: requests and tokens a second, time to the first token, memory; against two others.

    pip install xllamacpp                               # llama.cpp, compiled, with its server
    python bench/serve.py                               # 2 and 15 million parameters; 1, 8 and 32 clients
    python bench/serve.py --model out/tiny/sft/best     # a model of yours
    python bench/serve.py --sizes 15M --clients 8 --requests 8 --servers ours transformers
    python bench/serve.py --abuse 10000                 # bad requests, clients that leave, idle connections

Every client sends one request after the other and reads its answer as a stream. Models have random weights, prompts
random ids, answers a fixed length. "transformers" is the same server with transformers' `generate` in the place of our
loop: all requests that wait are answered as one batch, and the next ones after that. "llama.cpp" is its own server,
with the same weights in float32 (`convert.py export --format gguf`). Each server is a process of its own, all with as
many rows and threads, and the servers take turns, so that a change of the machine's speed affects all; memory is the
most of a process.

With --abuse the clients send so many requests in all, of which 5 % are malformed, 5 % too long, and 5 % go away before
their answer, while 200 connections are idle; every other answer has to be the same as that of a quiet server.

"slowest" is the mean time of the slowest client's requests, as a multiple of the mean of all.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.extras import need

need("bench/serve.py", "bench", "fastapi", "uvicorn", "transformers")
import convert
from bench.train_speed import SHAPES, peer
from checkpoint.directory import save_model
from checkpoint.extend import set_length
from decoding.fixed_rows import FixedRows, Grown
from decoding.params import SamplingParams
from decoding.rows import Token
from model import Transformer
from serving.api import make_app
from serving.assistant import load_assistant
from serving.connections import Server
from serving.engine import Engine
from serving.service import Service
from tokenizer import load_tokenizer

SERVERS = ("ours", "transformers", "llama.cpp")
CONTEXT = 1024  # tokens of the longest text


@dataclass(frozen=True)
class Args:
    """Measure the server under load."""

    sizes: tuple[Literal["2M", "15M", "60M"], ...] = ("2M", "15M")
    """models of random weights"""
    model: Path | None = None
    """a model directory in place of them"""
    tokenizer: Path = Path("data/tiny/tokenizer")
    """directory of a tokenizer for the models of random weights"""
    clients: tuple[int, ...] = (1, 8, 32)
    """numbers of clients at the same time"""
    servers: tuple[Literal[SERVERS], ...] = SERVERS  # type: ignore[valid-type]
    """what decodes"""
    requests: int = 4
    """requests of each client, one after the other"""
    prompt: int = 64
    """tokens of a prompt"""
    tokens: int = 64
    """tokens of an answer"""
    rows: int = 32
    """texts that a server decodes together"""
    abuse: int = 0
    """instead: number of requests, some of them bad; what should not be is an error"""
    threads: int = 2
    """processor cores of a server"""
    out: Path | None = None
    """also write the rows as JSON"""


class StaticBatches(FixedRows):
    """The same interface over transformers' `generate`: one batch after the other."""

    def __init__(self, model: Transformer, n: int) -> None:
        super().__init__(model, n)
        self.peer = peer(model).eval()

    @torch.inference_mode()
    def step(self) -> list[Grown]:
        texts = list(self._texts.values())
        width, n_new = max(text.start for text in texts), max(text.max_len - text.start for text in texts)
        ids = torch.tensor([[0] * (width - text.start) + text.ids for text in texts])
        mask = torch.tensor([[0] * (width - text.start) + [1] * text.start for text in texts])
        options = {"do_sample": False, "max_new_tokens": n_new, "eos_token_id": None}
        out = self.peer.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
        for text in texts:
            self.remove(text.key)
        return [Grown(text.key, [Token(i, 0.0) for i in row], "length") for text, row in zip(texts, out)]


def serve(kind: str, directory: Path, args: Args, parent: Connection) -> None:
    """Run a server, and send its port to `parent`."""
    torch.set_num_threads(args.threads)
    if kind == "llama.cpp":
        parent.send(serve_llama_cpp(directory, args))
        threading.Event().wait()
    assistant = load_assistant(directory, torch.device("cpu"), torch.float32, raw=True)
    rows = (FixedRows if kind == "ours" else StaticBatches)(assistant.model, args.rows)
    service = Service(directory.name, assistant, Engine(rows, 1000), SamplingParams(), 3600)
    server = Server(make_app([service]), port=0)

    def tell() -> None:
        while not server.started:
            time.sleep(0.01)
        parent.send(server.servers[0].sockets[0].getsockname()[1])

    threading.Thread(target=tell, daemon=True).start()
    server.run()


def serve_llama_cpp(directory: Path, args: Args) -> int:
    """Start llama.cpp's server in this process; return its port."""
    import xllamacpp

    path = directory.with_suffix(".gguf")
    convert.export(convert.Export(model=directory, format="gguf", dtype="fp32", out=path))
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), CONTEXT * args.rows, args.rows
    params.warmup, params.verbosity, params.n_threads_http = False, -1, 64
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    serve_llama_cpp.server = xllamacpp.Server(params)  # type: ignore[attr-defined]  # it runs as long as it is held
    return int(serve_llama_cpp.server.listening_address.rsplit(":", 1)[1])  # type: ignore[attr-defined]


def ask(port: int, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Send one request; return the seconds to its first token and to its end."""
    start, first = time.perf_counter(), None
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response, text = connection.getresponse(), b""
    while part := response.read1(65536):
        first = first or time.perf_counter()
        text += part
    connection.close()
    if response.status != 200 or not text.endswith(b"[DONE]\n\n"):
        raise RuntimeError(f"the server answered {response.status}: {text[:300]!r}")
    return first - start, time.perf_counter() - start


def load(port: int, n_clients: int, args: Args, vocab_size: int) -> dict[str, float]:
    """Let clients send their requests; return what was measured."""
    times: list[list[tuple[float, float]]] = [[] for _ in range(n_clients)]

    def client(i: int) -> None:
        draw = random.Random(i)
        for _ in range(args.requests):
            times[i].append(ask(port, draw.choices(range(vocab_size), k=args.prompt), args.tokens))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(n_clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, n = time.perf_counter() - start, n_clients * args.requests
    first = sorted(f for mine in times for f, _ in mine)
    means = [statistics.mean(total for _, total in mine) for mine in times]
    row = {"requests_per_second": n / seconds, "tokens_per_second": n * args.tokens / seconds}
    row |= {"first_p50_ms": 1e3 * statistics.median(first), "first_p99_ms": 1e3 * first[int(0.99 * len(first))]}
    return row | {"slowest": max(means) / statistics.mean(means)}


def abuse(port: int, pid: int, args: Args) -> None:
    """Send good and bad requests; raise RuntimeError for an answer that should not be, and print what was measured."""
    good = {"prompt": [5] * args.prompt, "max_tokens": 8, "temperature": 1, "seed": 1}
    kinds, expected = ["good"] * 17 + ["malformed", "too long", "gone"], post(port, good)["choices"]
    bodies: dict[str, Any] = {"malformed": {"prompt": {}}, "too long": {"prompt": [5] * 100_000}}
    statuses: Counter[str] = Counter()

    def one(i: int) -> None:
        kind = kinds[i % 20]
        if kind == "gone":
            raw = json.dumps(good | {"max_tokens": 500, "stream": i % 40 < 20}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(head + raw)
                time.sleep(0.01 * (i % 7))
        elif kind == "good":
            if post(port, good)["choices"] != expected:
                raise RuntimeError("a request has another answer than before")
        elif post(port, bodies[kind])["error"]["type"] != "invalid_request_error":
            raise RuntimeError(f"a {kind} request is not refused as one")
        statuses[kind] += 1

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        memory = []
        for part in range(4):
            list(pool.map(one, range(part * args.abuse // 4, (part + 1) * args.abuse // 4)))
            memory.append(f"{peak_memory(pid):.0f}")
    print(f"{dict(statuses)}; most memory after each quarter, MB: {', '.join(memory)}")


def post(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON that answers one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def peak_memory(pid: int) -> float:
    """Return the most memory that a process has had, in MB; nan where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), float("nan"))


def measure(directory: Path, args: Args) -> list[dict[str, Any]]:
    """Return the rows of the table for one model."""
    spawn, table, running = multiprocessing.get_context("spawn"), [], {}
    n_ids = load_tokenizer(directory).vocab_size
    for kind in args.servers:
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(kind, directory, args, theirs), daemon=True)
        process.start()
        running[kind] = process, mine.recv()
        ask(running[kind][1], [5] * args.prompt, args.tokens)  # compiles, warms up
    if args.abuse:
        process, port = running["ours"]
        abuse(port, process.pid, args)
    for n_clients in () if args.abuse else args.clients:
        for kind, (process, port) in running.items():
            row = {"model": directory.name, "clients": n_clients, "server": kind}
            row |= load(port, n_clients, args, n_ids) | {"memory_mb": peak_memory(process.pid)}
            print(
                f"{directory.name:6}{n_clients:8} {kind:14}"
                f"{row['requests_per_second']:12.2f}{row['tokens_per_second']:10.0f}"
                f"{row['first_p50_ms']:14.1f}{row['first_p99_ms']:14.1f}{row['slowest']:9.2f}{row['memory_mb']:11.0f}",
                flush=True,
            )
            table.append(row)
    for process, _ in running.values():
        process.terminate()  # SIGTERM: it finishes what runs
        process.join(60)
    return table


def save_models(args: Args, folder: Path) -> Iterator[Path]:
    """Yield a directory for each model, with room for texts of `CONTEXT` tokens."""
    if args.model is not None:
        assistant = load_assistant(args.model, torch.device("cpu"), torch.float32)
        set_length(assistant.model, CONTEXT)
        directory = folder / "model"
        save_model(directory, assistant.model, assistant.tokenizer)
        yield directory
        return
    tokenizer = load_tokenizer(args.tokenizer)
    for size in args.sizes:
        torch.manual_seed(0)
        directory = folder / size
        directory.mkdir()
        save_model(directory, Transformer(SHAPES[size][0].replace(max_seq_len=CONTEXT)), tokenizer)
        yield directory


def main(args: Args) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows."""
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.requests} requests of each client: "
        f"{args.prompt} tokens of prompt, {args.tokens} of answer"
    )
    print(
        f"{'model':6}{'clients':>8} {'server':14}{'requests/s':>12}{'tokens/s':>10}{'first p50 ms':>14}"
        f"{'first p99 ms':>14}{'slowest':>9}{'memory MB':>11}"
    )
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for directory in save_models(args, Path(folder)):
            table += measure(directory, args)
    if args.out:
        args.out.write_text(json.dumps(table, indent=2))
    return table


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))

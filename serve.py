"""Serve a model over HTTP: a page to chat on, and OpenAI's API for every client that knows it.

python serve.py                                    the newest fine-tuned model: a page at http://127.0.0.1:8000
python serve.py --model DIR --port 8001            another model, another port
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "user", "content": "以《江上》为题写一首五言绝句"}]}'
"""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from attention import Choice
from checkpoint.locate import DEFAULT_MODEL, find_model, is_adapter, read_from
from cli.args import fail, parse, run
from cli.extras import need
from cli.memory import check_memory, memory_bytes, size
from cli.progress import say
from decoding.params import SamplingParams

KEY_VARIABLE = "LITTLE_LLAMA_API_KEY"
MOST_ROWS = 16


@dataclass(frozen=True)
class Args:
    """Serve a model over HTTP: a page to chat on, and OpenAI's API for every client that knows it."""

    model: Path = DEFAULT_MODEL
    """directory of a model, an adapter or a run (then its best); if the default is missing: the newest below out/"""
    base: Path | None = None
    """with an adapter: directory of its base model; None: the one that adapter_config.json names"""
    more: tuple[str, ...] = ()
    """more models or adapters that clients choose by name: NAME=DIRECTORY ...; each has rows and memory of its own"""
    name: str | None = None
    """what clients call the model; None: the name of its directory"""
    host: str = "127.0.0.1"
    """address to listen at; 127.0.0.1: only this machine, 0.0.0.0: every network that it is in"""
    port: int = 8000
    """port to listen at; 0: any that is free"""
    rows: int | None = None
    """texts that are decoded together; None: 16, or fewer if their cache would need more than half of the memory"""
    queue: int = 64
    """texts that may wait; above that, clients are asked to try again later (429)"""
    timeout: float = 600.0
    """seconds that a request may take"""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=1024))
    """settings of decoding that a request leaves out"""
    stop: tuple[str, ...] = ()
    """texts that end every answer, beside those of the request"""
    system: str = ""
    """system message before every conversation that has none"""
    api_key: str | None = None
    """key that clients have to send; None: the environment variable LITTLE_LLAMA_API_KEY, else clients need no key"""
    hosts: tuple[str, ...] = ()
    """names of this machine that clients may use beside localhost and addresses"""
    cors_origins: tuple[str, ...] = ()
    """origins such as https://example.org whose pages may use this server; * for all"""
    max_seq_len: int | None = None
    """longest text in tokens, prompt and answer; None: what the model's config.json says"""
    device: str = "auto"
    """auto: cuda, else mps, else cpu"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """type of parameters and arithmetic; auto: bf16 where it is faster (a GPU)"""
    attention: Choice = "auto"
    """implementation of attention; auto: the fastest that works here"""

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "max_seq_len"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} should be at least 1, found {value}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port should be from 0 to 65535, found {self.port}")
        if not self.timeout > 0:
            raise ValueError(f"--timeout should be above 0 seconds, found {self.timeout}")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("--api_key is empty: give a key, or leave it out")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; exits with an error message where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # who comes while the model is loaded waits
    except OSError as error:
        fail(f"--port {port} at --host {host} cannot be used ({error.strerror}): choose another, or 0 for a free one")
    return listener


if __name__ == "__main__":
    arguments = parse(Args, "serve")  # before torch is loaded: --help and mistakes are answered at once
    need("serve.py", "serve", "fastapi", "uvicorn")
    listener = listen(arguments.host, arguments.port)

import torch

from attention import backends
from checkpoint.extend import set_length
from decoding.fixed_rows import FixedRows
from hardware import DTYPES, choose_device, fastest_dtype
from serving.api import make_app
from serving.assistant import Assistant, load_assistant
from serving.connections import Server
from serving.engine import Engine
from serving.service import Service
from training.checksums import MOST_BYTES, check_models


def main(args: Args, listener: socket.socket) -> dict[str, Any]:
    """Serve until SIGTERM or Ctrl-C; requests that have begun are answered first."""
    device = choose_device(args.device)
    dtype = fastest_dtype(device, decodes=True) if args.dtype == "auto" else DTYPES[args.dtype]
    backends.check(args.attention, dtype, device, training=False)
    directories = named(args)
    services = [open_service(args, *pair, device, dtype, len(directories)) for pair in directories.items()]
    for service in services[1:]:
        service.metrics = services[0].metrics
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    app = make_app(services, key, args.hosts, args.cors_origins)
    announce(services, listener, key)
    server = Server(app, timeout_graceful_shutdown=round(args.timeout) + 1)
    # uvicorn ends at the signal, and raises it once more when all is done: that shall not be the end of a process
    # that has done its work
    signal.signal(signal.SIGTERM, lambda *_: None)
    with backends.use(args.attention):
        server.run(sockets=[listener])
    return {}


def named(args: Args) -> dict[str, Path]:
    """Return the directories of the models by name, the main one first. Raises ValueError for a name without one."""
    directory = find_model(args.model)
    found = {args.name or name_of(args.model if args.model.exists() else directory): directory}
    for word in args.more:
        name, _, path = word.partition("=")
        if not name or not path or name in found:
            raise ValueError(f"--more expects NAME=DIRECTORY, each name once, found {word}")
        found[name] = find_model(Path(path))
    if args.base is not None and not any(map(is_adapter, found.values())):
        raise ValueError(f"--base is for an adapter, and {directory} is a whole model: leave it out")
    return found


def open_service(args: Args, name: str, directory: Path, device: torch.device, dtype: torch.dtype, n: int) -> Service:
    """Load one of n models."""
    base = args.base if is_adapter(directory) else None
    check_models(read_from(directory, base), MOST_BYTES)
    assistant = load_assistant(directory, device, dtype, base=base, stop=args.stop, system=args.system)
    if args.max_seq_len is not None:
        set_length(assistant.model, args.max_seq_len)
    engine = Engine(make_rows(assistant, args.rows, n), args.queue)
    return Service(*(name, assistant, engine, args.sampling, args.timeout), created=int(directory.stat().st_mtime))


def make_rows(assistant: Assistant, n: int | None, n_models: int) -> FixedRows:
    """Return the rows of one of n_models. Raises ValueError where their cache cannot fit into its share of memory."""
    model = assistant.model
    memory = torch.cuda.mem_get_info(model.device)[1] if model.device.type == "cuda" else memory_bytes()
    one = FixedRows(model, 1).bytes()
    n = n or max(1, min(MOST_ROWS, memory // n_models // 2 // one))
    what = f"the cache of {n} rows of {model.args.max_seq_len} tokens"
    check_memory(what, n * one, "a smaller --rows or --max_seq_len takes less", memory // n_models)
    return FixedRows(model, n)


def name_of(directory: Path) -> str:
    """Return what a model is called: its directory, or that of its run where it is the best or last of one."""
    if directory.name in ("best", "last"):  # links: to resolve them would name a step
        return directory.absolute().parent.resolve().name
    return directory.resolve().name


def announce(services: list[Service], listener: socket.socket, key: str | None) -> None:
    """Write what is served, where, and how much memory it may take."""
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    for service in services:
        rows, model = service.engine.rows, service.assistant.model
        say(f"{service.name}, {model.n_parameters() / 1e6:.2f} M parameters, at http://{host}:{port}/v1")
        say(
            f"{rows.n} texts of {service.context} tokens together: at most {size(rows.bytes())} of cache; "
            f"{service.engine.most_waiting} more may wait"
        )
        if rows.compiled is None:
            say("without the compiled step, answers depend on the load by the rounding of batched products")
        if service.assistant.template is None:
            say("the model has no chat template: it continues texts (/v1/completions)")
    say(f"a page to chat on: http://{host}:{port}")
    if host not in ("127.0.0.1", "[::1]") and key is None:
        say(f"everybody who reaches {host} may use it: --api_key asks for a key")


if __name__ == "__main__":
    run(
        partial(main, listener=listener),
        arguments,
        less_memory="a smaller --rows, --max_seq_len or --dtype bf16 takes less",
    )

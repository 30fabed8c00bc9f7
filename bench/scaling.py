"""Measure what a step on several processes is made of, for each backend, and what a process holds.

    python bench/scaling.py                                            # 15M and 60M, every backend, 1 and 2 processes
    python bench/scaling.py --sizes 15M --backends ddp fsdp --out out/scaling.jsonl      # goes on where it was stopped

Each row is a run of pretrain.py, with AdamW in float32 on one thread a process; `weak`: the rows of a process stay the
same, so a step of two processes has twice as many tokens. Times are those of rank 0:

    step       median of a step, without evaluations and checkpoints
    input      making the batch
    messages   time in which a message was under way, whether hidden by compute or not
    save       how long the loop waits when it saves a checkpoint, not the writing that goes on beside later steps;
               divided by the steps between two (--train.save_interval, 500 by default)
    held       bytes of all tensors of a process between backward pass and update: weights, gradients, moments, buffers
    formula    weights, gradients and moments of plan.py (planning/cluster.py)
    resident   growth of the resident memory of a process from before the model to after the steps

Compute is the step of one process: what a second one adds to it are messages that are not hidden, and the waiting for
memory and caches that the processes share.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from cli.extras import need

need("bench/scaling.py", "bench", "psutil")

SHAPES = {  # name -> flags of the shape, tokens a row, rows of a process
    "1M": ("dim 64 n_layers 2 n_heads 2", 64, 2),
    "15M": ("dim 288 n_layers 6 n_heads 6", 256, 4),
    "60M": ("dim 512 n_layers 14 n_heads 8 hidden_dim 1376", 256, 2),
}
VOCAB = 32_000
BACKENDS = {  # name -> flags, name of its formula
    "single": ("single", "DDP"),
    "ddp": ("ddp", "DDP"),
    "fsdp": ("fsdp", "FSDP2"),
    "zero1": ("deepspeed --train.zero_stage 1", "ZeRO-1"),
    "zero2": ("deepspeed --train.zero_stage 2", "ZeRO-2"),
    "zero3": ("deepspeed --train.zero_stage 3", "ZeRO-3"),
}
WARM_UP = 2  # steps
SAVE_INTERVAL = 500


@dataclass(frozen=True)
class Args:
    """Measure the parts of a step on several processes."""

    sizes: tuple[Literal[tuple(SHAPES)], ...] = ("15M", "60M")  # type: ignore[valid-type]
    """models"""
    backends: tuple[Literal[tuple(BACKENDS)], ...] = tuple(BACKENDS)  # type: ignore[valid-type]
    """ways to divide a step"""
    processes: tuple[int, ...] = (1, 2)
    """numbers of processes; `single` is always one"""
    steps: int = 5
    """measured steps, after two of warm-up"""
    out: Path | None = None
    """JSON lines; a row that is in it is not measured again"""


def main(args: Args) -> None:
    """Measure what is missing, and print the table."""
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.is_file() else []
    head = f"{'model':6}{'backend':9}{'procs':>5}{'tok/s':>8}{'step s':>8}{'input':>8}{'messages':>10}{'save':>8}"
    print(head + f"{'held MB':>9}{'formula':>9}{'resident':>10}")
    with tempfile.TemporaryDirectory(prefix="scaling_") as name:
        write_data(Path(name))
        for size in args.sizes:
            for backend in args.backends:
                for world in (1,) if backend == "single" else args.processes:
                    key = {"size": size, "backend": backend, "processes": world}
                    row = next((row for row in done if key.items() <= row.items()), None)
                    if row is None:
                        row = key | measure(Path(name), size, backend, world, args.steps)
                        if args.out:
                            with args.out.open("a") as file:
                                file.write(json.dumps(row) + "\n")
                    print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """Return a row of the table; input, messages and save as shares of a step."""
    step = row["step"]
    shares = (row["input"] / step, row["messages"] / step, row["save"] / SAVE_INTERVAL / step)
    words = [f"{row['size']:6}{row['backend']:9}{row['processes']:5}{row['tokens'] / step:8.0f}{step:8.3f}"]
    words += [f"{share:{width}.2%}" for share, width in zip(shares, (8, 10, 8))]
    return "".join(words) + f"{row['held'] / 1e6:9.0f}{row['formula'] / 1e6:9.0f}{row['resident'] / 1e6:10.0f}"


def measure(folder: Path, size: str, backend: str, world: int, steps: int) -> dict[str, Any]:
    """Run one case in processes of its own; return its numbers."""
    shape, length, rows = SHAPES[size]
    words = shape.split()
    flags = [word for name, value in zip(words[::2], words[1::2]) for word in (f"--model.{name}", value)]
    flags += ["--data.dir", folder, "--data.seq_len", length, "--data.batch_size", rows * world]
    flags += ["--optim.optimizer", "adamw", "--train.max_steps", WARM_UP + steps, "--train.save_interval", 0]
    flags += ["--train.dtype", "fp32", "--train.compile", "off", "--train.device", "cpu", "--train.log_interval", 0]
    flags += ["--train.backend", *BACKENDS[backend][0].split(), "--out", folder / "run", "--train.resume", "never"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", world] if backend != "single" else []
    command = [sys.executable, *launch, __file__, "--worker", folder / "found.json", BACKENDS[backend][1], *flags]
    done = subprocess.run(
        [str(word) for word in command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True
    )
    if done.returncode:
        sys.exit(f"{backend} on {world} failed:\n{done.stderr.decode(errors='replace')[-3000:]}")
    return json.loads((folder / "found.json").read_text())


def write_data(folder: Path) -> None:
    """Write a bin of random ids, and a tokenizer of as many."""
    import numpy as np
    from tokenizers import Tokenizer, decoders, models

    from bins.token_bin import BinWriter
    from tokenizer import load_tokenizer

    folder.joinpath("raw").mkdir()
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"</s>": VOCAB - 1}
    tokenizer = Tokenizer(models.BPE(words, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(folder / "raw" / "tokenizer.json"))
    (folder / "raw" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(folder / "raw")
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    with BinWriter(folder / "train", VOCAB, tokenizer.eos_id, tokenizer.sha256(), bos=tokenizer.begins) as writer:
        for _ in range(200):
            writer.add([*tokenizer.begins, *rng.integers(0, VOCAB - 1, 1000), tokenizer.eos_id])


# ---- in the processes


def work(found: Path, formula: str, flags: list[str]) -> None:
    """Train as pretrain.py does, and write the numbers of rank 0."""
    import psutil
    import torch

    import pretrain
    from cli.args import parse
    from dataset import PretrainData
    from planning import cluster, memory
    from training.state import Checkpoints
    from training.trainer import Trainer

    args = parse(pretrain.Args, "pretrain", flags)
    seconds: dict[str, list[float]] = {"input": [], "save": [], "step": []}
    rss, resident, held = psutil.Process().memory_info, [], []
    PretrainData.batch = timed(PretrainData.batch, seconds["input"])
    Checkpoints.save = timed(Checkpoints.save, seconds["save"])
    step, spans = Trainer._step, []

    def profiled(trainer: Trainer) -> float:
        if trainer.state.step < trainer.total_steps - 1:
            return step(trainer)
        resident.append(rss().rss)
        update = trainer.backend.step
        trainer.backend.step = lambda limit: held.append(bytes_of_tensors()) or update(limit)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            norm = step(trainer)  # the last step: its time is not counted, because the profiler takes some
        events = [e for e in profile.events() if e.name.startswith("gloo:")]
        spans.append(covered([(e.time_range.start, e.time_range.end) for e in events]) / 1e6)
        return norm

    Trainer._step = timed(profiled, seconds["step"])
    before = rss().rss
    pretrain.main(args)
    if int(os.environ.get("RANK", "0")) == 0:
        world, model = int(os.environ.get("WORLD_SIZE", "1")), args.model.made(VOCAB, args.data.seq_len)
        memory_step = memory.Step(args.data.batch_size // world, args.data.seq_len, "fp32", "adamw")
        if formula == "DDP":
            states = memory.training(model, memory_step)
        else:
            states = cluster.states(model, cluster.Strategy(formula, data=world), memory_step)
        numbers = {name: statistics.median(values[WARM_UP:] or values) for name, values in seconds.items()}
        numbers["step"] = statistics.median(seconds["step"][WARM_UP:-1])
        numbers |= {
            "messages": spans[0],
            "held": held[0],
            "resident": resident[0] - before,
            "tokens": args.data.batch_size * args.data.seq_len,
        }
        numbers["formula"] = sum(states[name] for name in ("weights", "gradients", "optimizer"))
        found.write_text(json.dumps(numbers))


def timed(function: Callable, seconds: list[float]) -> Callable:
    """Return a function that does the same and adds its seconds to a list."""

    def measured(*args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **named)
        seconds.append(time.perf_counter() - began)
        return result

    return measured


def bytes_of_tensors() -> int:
    """Return the bytes of the memory of all tensors of this process, each memory once."""
    import torch

    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    with torch.no_grad():
        tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    tensors = [getattr(each, "_local_tensor", each) for each in tensors]  # this process's part of it
    storages = [each.untyped_storage() for each in tensors if each.device.type == "cpu"]
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.nbytes()}.values())


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main(tyro.cli(Args, use_underscores=True))

"""Where a step runs: one process, or several with DistributedDataParallel, behind one interface.

    backend.wrap(model, optimizer)      what to call for a forward pass
    backend.accumulating(last)          a context for each micro-batch; gradients are exchanged in the last one
    backend.backward(loss)              loss: this micro-batch's share of the mean over the whole step
    backend.step(max_norm)              clip, update, zero; returns the gradient norm before clipping
    backend.sum(values)                 integers or floats summed over all ranks
    backend.gather(value)               one object of every rank, in a list
    backend.rank, backend.world, backend.main, backend.device

A backend is a context manager: leaving it leaves the process group.

The trainer knows only this. Another way to distribute is another class here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from optim import Optimizers


def make_backend(name: str, device: str, fp16: bool = False) -> SingleProcess:
    """The backend called `name` on `device` ("auto": cuda, else mps, else cpu); ValueError if it cannot run here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "single":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "torchrun started several processes, and --train.backend is single; say --train.backend ddp"
            )
        return SingleProcess(torch.device(device), fp16)
    if name == "ddp":
        if "RANK" not in os.environ:
            raise ValueError("--train.backend ddp is started by torchrun: torchrun --nproc_per_node 2 pretrain.py ...")
        return DataParallel(device, fp16)
    raise ValueError(f"the backend {name!r} is not available yet; choose single or ddp")


class SingleProcess:
    """One process on one device."""

    rank, world = 0, 1

    def __init__(self, device: torch.device, fp16: bool = False) -> None:
        self.device = device
        # float16 gradients underflow without a loss scale; bfloat16 and float32 need none
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    @property
    def main(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    def wrap(self, model: nn.Module, optimizer: Optimizers) -> Callable:
        self.optimizer = optimizer
        return model

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, max_norm: float) -> float:
        """Clip to `max_norm` (0: only measure), update and zero the gradients; a step whose norm is not finite is
        skipped. Returns the norm over all parameters before clipping."""
        for part in self.optimizer.parts:
            self.scaler.unscale_(part)
        norm = nn.utils.clip_grad_norm_(self.optimizer.parameters, max_norm or float("inf"))
        finite = bool(norm.isfinite())
        if finite:
            for part in self.optimizer.parts:
                self.scaler.step(part)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad()
        return norm.item()

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        """One object of every rank, in order of rank."""
        return [value]

    def __enter__(self) -> SingleProcess:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Leave the process group, if there is one."""


class DataParallel(SingleProcess):
    """Every rank holds the model; gradients are averaged over ranks (gloo on CPU, nccl on GPU)."""

    def __init__(self, device: str, fp16: bool) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if device == "cuda":
            local = int(os.environ["LOCAL_RANK"])  # the rank within this machine, which picks the GPU
            if local >= torch.cuda.device_count():
                raise ValueError(f"{local + 1} or more processes on a machine of {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(local)
            device = f"cuda:{local}"
        super().__init__(torch.device(device), fp16)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def wrap(self, model: nn.Module, optimizer: Optimizers) -> Callable:
        self.optimizer = optimizer
        ids = [self.device.index] if self.device.type == "cuda" else None
        self.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        # No forward pass changes a buffer, and a quantized model is nothing but buffers. Set afterwards: the argument
        # for it has another name from torch 2.13 on.
        self.wrapped.broadcast_buffers = False
        return self.wrapped

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.wrapped.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(
            loss * self.world
        )  # DDP divides by the number of ranks; the loss is already a share of the whole

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error in (None, SystemExit):  # after an error of this rank alone nobody else would come to the barrier
            # leaving at once now and then aborts the interpreter while gloo's threads still run
            dist.barrier()
            time.sleep(0.5)
        dist.destroy_process_group()


@contextlib.contextmanager
def caught_signals(backend: SingleProcess, ask: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `ask` with their number; a second one acts as usual, except with several processes, since
    torchrun passes on what a terminal or a scheduler has sent to every process already."""

    def caught(number: int, frame: Any) -> None:
        ask(number)
        if backend.world == 1:
            signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    for number in before if in_main else ():
        signal.signal(number, caught)
    try:
        yield
    finally:
        for number, handler in before.items() if in_main else ():
            signal.signal(number, handler)

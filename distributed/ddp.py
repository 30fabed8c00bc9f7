"""Several processes with DistributedDataParallel: gloo on CPUs, nccl on GPUs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distributed.single import SingleProcess
from optim.optimizers import Optimizers


class DataParallel(SingleProcess):
    """Every rank holds the whole model and trains on its own rows; gradients are averaged over ranks."""

    def __init__(self, device: torch.device, fp16: bool) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if device.type == "cuda":
            local, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()  # LOCAL_RANK: on this machine
            if local >= n_gpus:
                raise ValueError(
                    f"torchrun started {local + 1} or more processes on a machine with {n_gpus} GPUs; "
                    f"start it with --nproc_per_node {n_gpus}"
                )
            torch.cuda.set_device(local)
            device = torch.device("cuda", local)
        super().__init__(device, fp16)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def wrap(self, model: nn.Module, optimizer: Optimizers) -> Callable:
        self.optimizer = optimizer
        ids = [self.device.index] if self.device.type == "cuda" else None
        self.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        # No forward pass changes a buffer, and a quantized model consists of buffers only. An attribute, because the
        # argument for it has another name from torch 2.13 on.
        self.wrapped.broadcast_buffers = False
        return self.wrapped

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.wrapped.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        # DDP divides the sum of the gradients by the number of ranks, and the loss is already a share of the whole
        super().backward(loss * self.world)

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.barrier()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error in (None, SystemExit):  # after an error of this rank alone no other rank would reach the barrier
            # without the pause the interpreter now and then aborts while gloo's threads still run
            self.barrier()
            time.sleep(0.5)
        dist.destroy_process_group()

"""What all backends of several processes share: the process group, sums, messages, and the end of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distributed.single import SingleProcess
from distributed.watch import Watch, lost_connection

SPARE = 60.0  # seconds between the time limit of the watch, which names a rank, and that of the process group


class ProcessGroup(SingleProcess):
    """Several processes that torchrun or the deepspeed launcher has started: gloo on CPUs, nccl on GPUs."""

    def __init__(self, device: torch.device, fp16: bool, timeout: float = 600.0) -> None:
        """Join the process group; a rank that the others wait for longer than `timeout` seconds ends the run."""
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
        self.join(timedelta(seconds=timeout + SPARE))
        self.watch = Watch(self.rank, self.world, timeout)

    def join(self, limit: timedelta) -> None:
        """Start the process group."""
        try:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=limit)
        except dist.DistStoreError as error:
            raise ValueError(missing_ranks(error)) from None

    @torch.no_grad()
    def align(self, model: nn.Module) -> None:
        """Let all ranks start from the weights of rank 0, as DDP does, where each has the whole of them."""
        for p in model.parameters():
            if not (p.is_meta or hasattr(p, "placements")):
                dist.broadcast(p, 0)

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.watch.waiting():
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.world
        with self.watch.waiting():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        with self.watch.waiting():
            dist.barrier()

    def __exit__(self, error: type[BaseException] | None, value: BaseException | None = None, *_: object) -> None:
        if error is not None and lost_connection(value):
            self.watch.explain()  # does not return where a rank is gone
        if error in (None, SystemExit):  # after an error of this rank alone no other rank would reach the barrier
            # without the pause the interpreter now and then aborts while gloo's threads still run
            self.barrier()
            self.watch.stop()
            time.sleep(0.5)
        self.watch.stop()
        dist.destroy_process_group()


def missing_ranks(error: Exception) -> str:
    """Return a sentence for processes that did not join in time."""
    counts = str(error).split(". ")[0]
    return (
        f"the {os.environ['WORLD_SIZE']} processes of the run did not all start ({counts}): start the same command on "
        "every machine, with one --master_addr, one --master_port and a --node_rank of its own each"
    )

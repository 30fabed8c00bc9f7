"""Ranks of one run as threads of this process: a backend in which a rank of the processes is no data rank."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from distributed.single import SingleProcess


class Exchange:
    """Where `world` threads meet and hand an object each to all others."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)  # seconds: a thread that fails does not block the others
        self.slots: list[Any] = [None] * world

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class ThreadRank(SingleProcess):
    """Rank `rank` of as many as `exchange` joins; two neighbours share a data rank, as with tensor parallelism of two.

    `calls` records the collective calls and the directories that `save` gets.
    """

    def __init__(self, rank: int, exchange: Exchange) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.world, self.exchange = rank, len(exchange.slots), exchange
        self.calls: list[tuple[str, Any]] = []

    @property
    def data_rank(self) -> int:
        return self.rank // 2

    @property
    def data_world(self) -> int:
        return self.world // 2

    def gather(self, value):
        return self.exchange.gather(self.rank, value)

    def barrier(self):
        self.exchange.barrier.wait()

    def sum(self, values):
        return [sum(column) / 2 for column in zip(*self.gather(list(values)))]  # two ranks hold the same values

    def step(self, max_norm):
        for parameter in self.optimizer.parameters:
            parameter.grad = sum(self.gather(parameter.grad)) / 2
        return super().step(max_norm)

    def state(self, model, optimizer):
        self.calls.append(("state", None))
        self.barrier()  # fails where a rank does not take part
        return super().state(model, optimizer)

    def load_state(self, model, optimizer, state):
        self.calls.append(("load_state", None))
        self.barrier()
        super().load_state(model, optimizer, state)

    def save(self, model, write, directory):
        self.calls.append(("save", directory))
        self.barrier()
        super().save(model, write, directory)

    def load(self, model, read, directory):
        self.calls.append(("load", directory))
        self.barrier()
        super().load(model, read, directory)


def on_every_rank(work, world: int) -> list[Any]:
    """Return what `work(rank, exchange)` returns on each rank, all at the same time."""
    exchange = Exchange(world)
    with ThreadPoolExecutor(world) as pool:
        return [task.result() for task in [pool.submit(work, rank, exchange) for rank in range(world)]]

"""How long a step of training takes on this machine, from steps of two smaller models: one block, and three.

A block takes the same time wherever it stands, so the time of L blocks follows from the difference of the two, and what
is outside of the blocks from the rest. Only this file of the folder loads torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from model_args import ModelArgs
from planning.memory import Step

Clock = Callable[[], float]


class Times(NamedTuple):
    """Seconds of one model with some number of blocks."""

    micro_batch: float
    """seconds of a forward and backward pass"""
    update: float
    """seconds of an update of all weights"""

    def step(self, micro_batches: int) -> float:
        """Return the seconds of an optimizer step."""
        return micro_batches * self.micro_batch + self.update


def measure(args: ModelArgs, step: Step, seconds: float = 10.0, clock: Clock = time.perf_counter) -> Times:
    """Return the times of a model of this shape, not compiled, on the device that training would choose.

    seconds: time for steps of the two models together; at least three of each are done. clock: what counts seconds.
    """
    few, many = 1, 3  # blocks
    small, large = times_of([args.replace(n_layers=n) for n in (few, many)], step, seconds, clock)
    return Times(*(max(0.0, a + (b - a) / (many - few) * (args.n_layers - few)) for a, b in zip(small, large)))


def times_of(shapes: Sequence[ModelArgs], step: Step, seconds: float, clock: Clock = time.perf_counter) -> list[Times]:
    """Return the median times of steps of whole models, which take turns, so that other load strikes all of them."""
    models = [Stepper(shape, step, clock) for shape in shapes]
    rounds = []
    begin = time.perf_counter()
    while len(rounds) < 4 or time.perf_counter() - begin < seconds:
        rounds.append([model.step() for model in models])
    # the first step of each is slower, and is not counted
    return [Times(*map(statistics.median, zip(*of_one))) for of_one in zip(*rounds[1:])]


class Stepper:
    """A new model that trains on random tokens."""

    def __init__(self, args: ModelArgs, step: Step, clock: Clock) -> None:
        import torch  # takes seconds to load, and a plan without a measurement needs none

        from hardware import DTYPES, choose_device
        from model import Transformer
        from optim.args import OptimArgs
        from optim.optimizers import build_optimizer

        device = choose_device("auto")
        self.model = Transformer(args).to(device)
        self.model.compute_dtype, self.model.gradient_checkpointing = DTYPES[step.dtype], step.checkpointing
        self.optimizer = build_optimizer(self.model, OptimArgs(step.optimizer, galore_rank=step.galore_rank))
        self.tokens = torch.randint(0, args.vocab_size, (step.rows, step.seq_len), device=device)
        self.clock = clock
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step(self) -> tuple[float, float]:
        """Do one step; return the seconds of the passes and of the update."""
        start = self._now()
        loss, n_targets = self.model(self.tokens, self.tokens)
        (loss / n_targets).backward()
        middle = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return middle - start, self._now() - middle

    def _now(self) -> float:
        self.wait()
        return self.clock()

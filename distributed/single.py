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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from optim.optimizers import Optimizers


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

"""Several processes with DistributedDataParallel: every rank holds the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from distributed.group import ProcessGroup
from optim.optimizers import Optimizers


class DataParallel(ProcessGroup):
    """Every rank holds the whole model and trains on its own rows; gradients are averaged over ranks."""

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

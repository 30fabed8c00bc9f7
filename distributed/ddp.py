"""Several processes with DistributedDataParallel: every rank holds the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
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
        if self.world > 2 and self.device.type == "cpu":  # of two ranks there is one sum; nccl was not tried
            self.wrapped.register_comm_hook(None, average_in_order)
        return self.wrapped

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.wrapped.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        # DDP divides the sum of the gradients by the number of ranks, and the loss is already a share of the whole
        super().backward(loss * self.world)


def average_in_order(_, bucket):  # DDP takes no types that are written as strings, as all are in this file
    """Return a future of the gradients of a dist.GradBucket, averaged over the ranks, added in the order of the ranks.

    In which order the usual sum adds depends on where a gradient lies in its bucket, and DDP fills its buckets anew
    after the first step: a run that goes on would have other bits than one that was not interrupted.
    """
    gradients, world = bucket.buffer(), dist.get_world_size()  # (n,)
    padded = nn.functional.pad(gradients, (0, -len(gradients) % world))
    parts = torch.empty_like(padded)  # this rank's share of the gradients of rank 0, then of rank 1, ...
    dist.all_to_all_single(parts, padded)
    total, *others = parts.chunk(world)
    for other in others:
        total += other
    dist.all_gather(list(padded.chunk(world)), total.div_(world))
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(gradients.copy_(padded[: len(gradients)]))
    return done

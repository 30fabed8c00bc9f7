"""Several processes with FSDP2: every rank holds a part of each parameter, of its gradient and of its moments.

The weights of a block are gathered when the block runs, forward and backward, and dropped behind it. They and the
gradients travel in the dtype of the parameters (float32); each layer casts to the dtype of the activations, as on one
process, so that the numbers are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed.group import ProcessGroup
from distributed.whole import whole_parameters
from optim.muon import Muon
from optim.optimizers import Optimizers


class FullyShard(ProcessGroup):
    """Parameters, gradients and moments are divided over the ranks, each of which trains on its own rows."""

    replicated = False

    def compile(self, model: nn.Module) -> None:
        """Compile every block by itself: what gathers its weights is not compiled."""
        for block in blocks_of(model):
            if block._compiled_call_impl is None:
                block.compile()

    def evaluation(self, model: nn.Module) -> Callable:
        return model  # called, not its `forward`: the call gathers the weights

    def wrap(self, model: nn.Module, optimizer: Optimizers) -> Callable:
        self.optimizer = optimizer
        names = {p: name for name, p in model.named_parameters()}
        with torch.no_grad():
            for p in names:  # as DDP does: all start from the weights of rank 0
                dist.broadcast(p, 0)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        parts = dict(model.named_parameters())
        optimizer.replace({p: parts[name] for p, name in names.items()})
        for each in optimizer.parts:
            if isinstance(each, Muon):  # the update of a matrix depends on all of it
                each.gather, each.part = self.whole, self.part
        return model

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP divides the sum of the gradients by the number of ranks, and the loss is already a share of the whole
        super().backward(loss * self.world)

    def clip(self, max_norm: float) -> torch.Tensor:
        parameters = self.optimizer.parameters
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = self.whole(norm)  # over all parts: every rank takes part, and gets the same number
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    # ---- checkpoints

    def state(self, model: nn.Module, optimizer: Optimizers) -> dict[str, Any] | None:
        reshard(model)
        return super().state(model, optimizer)

    def whole(self, value: Any) -> Any:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def part(self, parameter: nn.Parameter, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or not torch.is_tensor(value) or value.shape != parameter.shape:
            return value  # such as the number of steps
        return distribute_tensor(
            value.to(self.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )  # no exchange: every rank has the whole of it

    def save(self, model: nn.Module, write: Callable[[Path], None], directory: Path | None) -> None:
        with self.whole_parameters(model):
            super().save(model, write, directory)

    @torch.no_grad()
    def load(self, model: nn.Module, read: Callable[[Path], None], directory: Path) -> None:
        """Call `read(directory)` on the main rank, and give every rank its part of what it has read."""
        with self.whole_parameters(model) as pairs:
            if self.main:
                read(directory)
        for own, whole in pairs:
            value = whole.to(self.device) if self.main else torch.empty(own.shape, dtype=own.dtype, device=self.device)
            dist.broadcast(value, 0)
            own.copy_(self.part(own, value))

    def whole_parameters(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Return `whole_parameters` of a model of this backend."""
        reshard(model)
        return whole_parameters(model, lambda p: self.whole(p.detach()), self.main)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the modules of its longest list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def reshard(model: nn.Module) -> None:
    """Let every module hold its parts again: after an evaluation the outermost one still holds whole parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

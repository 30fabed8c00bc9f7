"""Several processes with FSDP2: every rank holds a part of each parameter, of its gradient and of its moments.

The weights of a block are gathered when the block runs, forward and backward, and dropped behind it. They and the
gradients travel in the dtype of the parameters (float32); each layer casts to the dtype of the activations, as on one
process, so that the numbers are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

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
        empty = any(p.is_meta for p in names)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in (*blocks_of(model), model):
            self.align(module)
            self.shard(module, mesh)
        if empty:
            model.to_empty(device=self.device)
            self.draw(model)
        parts = dict(model.named_parameters())
        optimizer.replace({p: parts[name] for p, name in names.items()})
        share_muon(optimizer, self)
        return model

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Divide the parameters of a module that are whole yet, and free them: those of a file are mapped, so that only
        those of one block take memory at a time."""
        whole = [p for p in module.parameters() if not isinstance(p, DTensor)]
        fully_shard(module, mesh=mesh)
        for p in whole:  # the optimizer still has them
            p.data = p.data.new_empty(0)

    @torch.no_grad()
    def draw(self, model: nn.Module) -> None:
        """Fill a model whose parameters have no values yet as `init_weights` would have done, with the same bits.

        It asks the model for its parameters, and is given a whole one at a time, of which this rank keeps its part.
        """
        parts = dict(model.named_parameters())

        def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
            for name, p in parts.items():
                whole = torch.ones(p.shape, dtype=p.dtype)  # as a norm starts
                yield name, whole
                if not p.is_meta:  # else another process has it
                    p.copy_(self.part(p, whole))

        model.named_parameters = one_by_one
        try:
            model.init_weights()
        finally:
            del model.named_parameters

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP divides the sum of the gradients by the number of ranks, and the loss is already a share of the whole
        super().backward(loss * self.data_world)

    def clip(self, max_norm: float) -> torch.Tensor:
        parameters = self.optimizer.parameters
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = self.whole(norm)  # over all parts: every rank takes part, and gets the same number
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    # ---- checkpoints

    @contextlib.contextmanager
    def all_modules(self, model: nn.Module) -> Iterator[None]:
        """Within the block a model has all its modules, with this rank's parts of its parameters."""
        reshard(model)
        yield

    def state(self, model: nn.Module, optimizer: Optimizers) -> dict[str, Any] | None:
        with self.all_modules(model):
            return super().state(model, optimizer)

    def parts(self, model: nn.Module, optimizer: Optimizers) -> tuple[dict, dict[str, dict[str, Any]]]:
        with self.all_modules(model):
            return super().parts(model, optimizer)

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

    def load(self, model: nn.Module, read: Callable[[Path], None], directory: Path) -> None:
        """Call `read(directory)`: every rank copies its part of each tensor, and reads no other part of the files."""
        with self.all_modules(model), implicit_replication():  # a tensor of a file is whole on every rank
            read(directory)

    def whole_parameters(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Return `whole_parameters` of a model of this backend."""
        reshard(model)
        return whole_parameters(model, lambda p: self.whole(p.detach()), self.main)


def share_muon(optimizer: Optimizers, backend: FullyShard) -> None:
    """Let Muon see whole matrices: the update of one depends on all of it."""
    for each in optimizer.parts:
        if isinstance(each, Muon):
            each.gather, each.part = backend.whole, backend.part


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the modules of its longest list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def reshard(model: nn.Module) -> None:
    """Let every module hold its parts again: after an evaluation the outermost one still holds whole parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

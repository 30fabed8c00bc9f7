"""Tensor and pipeline parallel on a mesh of processes, over data that DDP or FSDP2 divides.

The mesh has the dimensions pipeline, data and tensor; neighbours in tensor are neighbours in rank, because they
exchange most. Processes that differ in tensor or pipeline only train on the same rows: they share a `data_rank`. What
is saved is the state of every other backend, by name of the parameter, so that a run goes on with any other mesh.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from distributed.fsdp import FullyShard, blocks_of, share_muon
from distributed.pipeline import Part, Pipeline
from distributed.split import stage_of
from distributed.tensor_parallel import as_placed, divide
from distributed.whole import whole_parameters
from optim.optimizers import Optimizers


class Parallel(FullyShard):
    """Processes of which each has a part of the model: some layers, some heads, some rows of the vocabulary."""

    def __init__(
        self, device: torch.device, timeout: float, *, tp: int, pp: int, schedule: str = "1f1b", sharded: bool
    ) -> None:
        """Join the process group; sharded: FSDP2 over the data ranks, else each holds the whole of its part."""
        world = int(os.environ["WORLD_SIZE"])
        if world % (tp * pp):
            raise ValueError(
                f"--train.tp {tp} and --train.pp {pp} need a multiple of {tp * pp} processes, and torchrun started "
                f"{world}: start that many with --nproc_per_node and --nnodes"
            )
        self.tp, self.pp, self.schedule, self.data = tp, pp, schedule, world // (tp * pp)
        super().__init__(device, False, timeout)
        # a whole tensor is gathered over one dimension of the mesh after the other: a warning would say so each time
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        # FSDP2 with parts of one process, and all gradients averaged, is what DDP does, and it knows DTensors
        sizes = {"pp": pp, "replicate": 1 if sharded else self.data, "shard": self.data if sharded else 1, "tp": tp}
        self.mesh = init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        self.over_data = self.mesh["shard"] if sharded else self.mesh["replicate", "shard"]
        self.stage = self.rank // (self.data * tp)
        self.leads = self.rank % (self.data * tp) == 0  # the first of its stage

    @property
    def data_rank(self) -> int:
        return self.rank // self.tp % self.data

    @property
    def data_world(self) -> int:
        return self.data

    def sum(self, values: Sequence[float]) -> list[float]:
        return [value / (self.tp * self.pp) for value in super().sum(values)]  # so many processes add the same

    # ---- a step

    def wrap(self, model: nn.Module, optimizer: Optimizers) -> Callable:
        self.optimizer = optimizer
        names = {p: name for name, p in model.named_parameters()}
        empty = any(p.is_meta for p in names)
        self.align(model)
        self.part_of_model = part = Part(model, self.stage, self.pp)
        if self.tp > 1:
            divide(model, self.mesh["tp"])
            part.tie()
        model.forward = part.forward
        if self.data > 1:
            for module in (*blocks_of(model), model):
                self.shard(module, self.over_data)
        if empty:
            model.to_empty(device=self.device)
        part.tie()
        with part.whole():
            if empty:
                self.draw(model)
            own = {name: p for name, p in model.named_parameters() if not p.is_meta}
        optimizer.replace({p: own.get(name) for p, name in names.items()})
        share_muon(optimizer, self)
        if self.pp > 1:
            self.pipeline = Pipeline(part, self.mesh["pp"].get_group(), self.device, self.schedule, self.tp)
        return self.evaluation(model)

    def evaluation(self, model: nn.Module) -> Callable:
        if self.pp > 1:
            return self.pipeline.forward
        return lambda tokens, targets, **inputs: model(tokens, targets=targets, **inputs)

    def forward_backward(
        self, call: Callable, micro_batches: Sequence[dict[str, Any]], n_targets: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.pp == 1:
            return super().forward_backward(call, micro_batches, n_targets)
        return self.pipeline.step(micro_batches, self.data / max(1, n_targets))  # FSDP2 divides by the data ranks

    def clip(self, max_norm: float) -> torch.Tensor:
        parameters = [p for p in self.optimizer.parameters if p.grad is not None]
        for p in parameters:
            as_placed(p)
        copy = self._add_gradients_of_tied_head()
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for p in parameters:
            if p is not copy:
                local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                squares += torch.linalg.vector_norm(local).double().square() / copies(p)
        with self.watch.waiting():
            dist.all_reduce(squares)
        norm = squares.sqrt()
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _add_gradients_of_tied_head(self) -> nn.Parameter | None:
        """Give embedding and head, which are one matrix on the first and on the last stage, the sum of the gradients
        of both; return the one of them that the first stage counts."""
        part = self.part_of_model
        if not part.tied or self.pp == 1 or not (part.first or part.last):
            return None
        p = part.model.model.embed_tokens.weight if part.first else part.model.lm_head.weight
        mine = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        theirs = torch.empty_like(mine)
        peer = self.pp - 1 if part.first else 0
        group = self.mesh["pp"].get_group()
        both = [dist.P2POp(dist.isend, mine, group=group, group_peer=peer)]
        both += [dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        mine += theirs  # in any order the same bits
        return None if part.first else p

    # ---- checkpoints

    @contextlib.contextmanager
    def all_modules(self, model: nn.Module) -> Iterator[None]:
        with super().all_modules(model), self.part_of_model.whole():  # parameters of other stages are on "meta"
            yield

    def state(self, model: nn.Module, optimizer: Optimizers) -> dict[str, Any] | None:
        with self.all_modules(model):
            named = optimizer.by_name(model, optimizer.state_dict())
        moments: dict[str, Any] = {}
        for name, values in named.items():
            whole = {key: self.whole(value) for key, value in values.items()}  # one by one, all processes of a stage
            if self.leads and self._stage_of(name) == self.stage:
                moments[name] = {key: value.cpu() for key, value in whole.items()}
        for stage in range(1, self.pp):
            self._send_moments(moments, stage)
        return {"moments": moments, "scaler": {}} if self.main else None

    def parts(self, model: nn.Module, optimizer: Optimizers) -> tuple[dict, dict[str, dict[str, Any]]]:
        weights, moments = super().parts(model, optimizer)
        with self.all_modules(model):
            own = {name: p for name, p in model.named_parameters() if self._stage_of(name) == self.stage}
        return {p: weights[p] for p in own.values()}, {name: moments[name] for name in own if name in moments}

    def _send_moments(self, moments: dict[str, Any], stage: int) -> None:
        """Add those of a stage to `moments` of the main rank, parameter by parameter."""
        leader = stage * self.data * self.tp
        if self.rank == leader:
            for pair in [*moments.items(), None]:
                dist.send_object_list([pair], dst=0, device=self.device)
        elif self.main:
            pair: list[Any] = [None]
            while True:
                dist.recv_object_list(pair, src=leader, device=self.device)
                if pair[0] is None:
                    return
                moments[pair[0][0]] = pair[0][1]

    def load_state(self, model: nn.Module, optimizer: Optimizers, state: dict[str, Any]) -> None:
        if "moments" not in state:
            raise ValueError(
                "the checkpoint is of an older version, which has its moments by number: go on for a step with "
                "--train.backend single, and then with --train.tp or --train.pp"
            )
        with self.all_modules(model):
            elsewhere = {name for name, p in model.named_parameters() if p.is_meta}
            moments = {name: value for name, value in state["moments"].items() if name not in elsewhere}
            super().load_state(model, optimizer, state | {"moments": moments})

    @contextlib.contextmanager
    def whole_parameters(self, model: nn.Module) -> Iterator[list[tuple[nn.Parameter, torch.Tensor]]]:
        with self.all_modules(model):
            names = {p: name for name, p in model.named_parameters()}
            with whole_parameters(model, lambda p: self._to_main(names[p], p.detach()), self.main) as pairs:
                yield pairs

    def _to_main(self, name: str, p: torch.Tensor) -> torch.Tensor:
        """Return on the main rank the whole of a parameter, of whatever stage; every process calls it."""
        stage = self._stage_of(name)
        leader = stage * self.data * self.tp
        value = self.whole(p) if stage == self.stage else p
        if stage and self.main:
            value = torch.empty(p.shape, dtype=p.dtype, device=self.device)
            dist.recv(value, src=leader)
        elif stage and self.rank == leader:
            dist.send(value.contiguous(), dst=0)
        return value

    def _stage_of(self, name: str) -> int:
        return stage_of(name, self.part_of_model.model.args.n_layers, self.pp)


def copies(parameter: nn.Parameter) -> int:
    """Return how many processes of a stage have the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    number = 1
    for dimension, placement in enumerate(parameter.placements):
        number *= mesh.size(dimension) if placement.is_replicate() else 1
    return number

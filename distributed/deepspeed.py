"""Several processes with DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), stages 0 to 3.

Stage 0 exchanges gradients as DDP does; 1 divides the optimizer's moments over the ranks, 2 also the gradients, 3 also
the parameters. Parameters and what is exchanged are float32, and the model casts to the dtype of the activations
itself: DeepSpeed's own bf16 mode counts Adam's first step twice at stage 0.

What is saved is the state of every other backend, by name of the parameter; DeepSpeed's own files are not used.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distributed.deepspeed_config import Wanted, make_config
from distributed.group import ProcessGroup
from distributed.whole import whole_parameters
from optim.optimizers import Optimizers


class Zero(ProcessGroup):
    """The processes of a DeepSpeed engine."""

    replicated = False

    def __init__(self, device: torch.device, timeout: float, **flags: Any) -> None:
        """Join the process group; flags: fields of `Wanted` but the number of processes."""
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a warning says that it was found out
        world = int(os.environ["WORLD_SIZE"])
        self.config = make_config(Wanted(world=world, **flags))  # refused before anything is waited for
        self.stage: int = self.config["zero_optimization"]["stage"]
        super().__init__(device, False, timeout)

    def join(self, limit: timedelta) -> None:
        super().join(limit)
        self.deepspeed = load_library()
        self.deepspeed.init_distributed(dist_backend=dist.get_backend(), timeout=limit)  # takes the group that there is

    # ---- a step

    def compile(self, model: nn.Module) -> None:
        if self.stage == 3:
            raise ValueError("--train.compile on does not go with ZeRO stage 3, which exchanges parameters in between")
        model.compile()

    def evaluation(self, model: nn.Module) -> Callable:
        return model if self.stage == 3 else model.forward  # at stage 3, calls of modules gather their parameters

    def wrap(self, model: nn.Module, optimizer: Optimizers) -> Callable:
        self.optimizer = optimizer
        self.align(model)
        if self.stage and len(optimizer.parts) > 1:
            raise ValueError(
                "--train.backend deepspeed divides the parameters of one optimizer, at --train.zero_stage 1, 2 and 3: "
                "use --optim.optimizer adamw, or --train.backend fsdp, where Muon is exact"
            )
        self.engine = self.deepspeed.initialize(model=model, optimizer=optimizer.parts[0], config=self.config)[0]
        return self.engine

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed divides by the number of ranks, and the loss is already a share of the whole
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, max_norm: float) -> float:
        if self.stage == 0:  # every rank holds the whole gradients
            return super().step(max_norm)
        self.engine.step()  # clips at what `make_config` wrote; skips the update when the norm is not finite
        return float(self.engine.get_global_grad_norm())

    # ---- checkpoints

    def state(self, model: nn.Module, optimizer: Optimizers) -> dict[str, Any] | None:
        if self.stage == 0:
            return super().state(model, optimizer)
        self._link_moments()
        moments: dict[str, dict[str, Any]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad and optimizer.parts[0].state:
                values = {key: self._whole_moment(p, key) for key in ("exp_avg", "exp_avg_sq")}
                if self.main:
                    moments[name] = {key: value.cpu() for key, value in values.items()} | {"step": self._steps()}
        return {"moments": moments, "scaler": {}} if self.main else None

    def parts(self, model: nn.Module, optimizer: Optimizers) -> tuple[dict, dict[str, dict[str, Any]]]:
        if self.stage == 0:
            return super().parts(model, optimizer)
        self._link_moments()
        weights: dict[nn.Parameter, torch.Tensor] = {}
        moments: dict[str, dict[str, Any]] = {}
        for number, (name, p) in enumerate(model.named_parameters()):  # whole one by one; each rank keeps its share
            mine = number % self.world == self.rank
            value = self._whole(p) if self.stage == 3 else p.detach()
            if mine:
                weights[p] = value.cpu()
            if p.requires_grad and optimizer.parts[0].state:
                values = {key: self._whole_moment(p, key) for key in ("exp_avg", "exp_avg_sq")}
                if mine:
                    moments[name] = {key: value.cpu() for key, value in values.items()} | {"step": self._steps()}
        return weights, moments

    def load_state(self, model: nn.Module, optimizer: Optimizers, state: dict[str, Any]) -> None:
        if self.stage == 0:
            super().load_state(model, optimizer, state)
            return
        moments = state["moments"] if "moments" in state else optimizer.by_name(model, state["optimizer"])
        if not moments:
            return
        steps = next(iter(moments.values()))["step"]
        own = optimizer.parts[0].state
        for flat in self._flat_parameters():  # as the first step would make them
            zeros = {key: torch.zeros_like(flat.data) for key in ("exp_avg", "exp_avg_sq")}
            own[flat] = {"step": torch.as_tensor(steps, dtype=torch.float32).clone()} | zeros
        self._link_moments()
        for name, p in model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq") if p.requires_grad else ():
                if name not in moments:
                    raise ValueError(f"the saved optimizer state has no moments of {name}, which is trained here")
                self._set(p, moments[name][key], key)

    def save(self, model: nn.Module, write: Callable[[Path], None], directory: Path | None) -> None:
        with whole_parameters(model, self._whole, self.main) if self.stage == 3 else contextlib.nullcontext():
            super().save(model, write, directory)

    @torch.no_grad()
    def load(self, model: nn.Module, read: Callable[[Path], None], directory: Path) -> None:
        if self.stage < 3:
            super().load(model, read, directory)
            if self.stage:
                self.engine.optimizer.refresh_fp32_params()
            return
        with whole_parameters(model, self._whole, self.main) as pairs:
            if self.main:
                read(directory)
        for own, whole in pairs:
            value = whole.to(self.device) if self.main else torch.empty(own.ds_shape, dtype=own.dtype)
            value = value.to(self.device)
            dist.broadcast(value, 0)
            with self.deepspeed.zero.GatheredParameters([own], modifier_rank=0):
                own.data.copy_(value)
            if own.requires_grad:
                self._set(own, value)

    # ---- parts of a parameter

    def _whole(self, p: nn.Parameter) -> torch.Tensor:
        """Return a whole parameter of stage 3; collective."""
        with self.deepspeed.zero.GatheredParameters([p]):
            return p.data.clone()

    def _whole_moment(self, p: nn.Parameter, key: str) -> torch.Tensor:
        return self.deepspeed.utils.safe_get_full_optimizer_state(p, key)

    def _set(self, p: nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        """Set this rank's part of a moment, or with `key` None of the parameter that the optimizer updates."""
        value, utils = value.to(self.device, torch.float32), self.deepspeed.utils
        if self.stage < 3:
            utils.safe_set_full_optimizer_state(p, value, key)
            return
        size = -(-p.ds_numel // self.world)  # parts are of one size, and the last one is filled up
        flat = nn.functional.pad(value.flatten(), (0, size * self.world - p.ds_numel))
        part = flat[self.rank * size : (self.rank + 1) * size]
        if key is None:
            utils.safe_set_local_fp32_param(p, part)
        else:
            utils.safe_set_local_optimizer_state(p, part, key)

    def _link_moments(self) -> None:
        """Let each parameter know its part of the flat moments. DeepSpeed does so in the step of the first group,
        before the other groups have any."""
        if self.stage < 3 and self.optimizer.parts[0].state:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_parameters(self) -> list[torch.Tensor]:
        """Return the flat tensors that the optimizer updates on this rank."""
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _steps(self) -> torch.Tensor:
        """Return how many steps the optimizer has done, (), float32."""
        return torch.as_tensor(self.optimizer.parts[0].state[self._flat_parameters()[0]]["step"]).cpu()


def load_library() -> Any:
    """Import DeepSpeed, quietly, without the extension that it would compile for the first 30 s on a CPU."""
    import deepspeed
    from deepspeed import ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names that it calls
    if "deepspeed_shm_comm" in getattr(ops, "__compatible_ops__", {}):  # messages go through gloo
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed

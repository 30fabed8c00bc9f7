"""The interface between the training loop and the processes that share a step, and its form for one process.

The loop calls every method on every rank, at the same point of the run, and `wrap` before all others. A backend whose
ranks hold parts of the model can therefore exchange them inside any method. Such ranks train on the same rows: they
share a `data_rank`. In data parallelism alone, data ranks and process ranks are equal.

A backend is a context manager; leaving it leaves the process group. Another way to distribute is another class here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optim.optimizers import Optimizers


class SingleProcess:
    """One process on one device."""

    rank, world = 0, 1
    replicated = True  # whether each rank holds the whole model

    def __init__(self, device: torch.device, fp16: bool = False) -> None:
        self.device = device
        # float16 gradients underflow without a loss scale; bfloat16 and float32 need none
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    @property
    def main(self) -> bool:
        """Whether this rank writes files and notices."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Number of the share of each batch that this process trains on."""
        return self.rank

    @property
    def data_world(self) -> int:
        """Number of shares that a batch is divided into."""
        return self.world

    def place(self, model: nn.Module) -> None:
        """Bring a model to the device of this rank; one on "meta" gets weights in `wrap`."""
        if not any(p.is_meta for p in model.parameters()):
            model.to(self.device)

    # ---- a step

    def wrap(self, model: nn.Module, optimizer: Optimizers) -> Callable:
        """Prepare a model and its optimizer for training; return what to call for a forward pass."""
        self.optimizer = optimizer
        return model

    def compile(self, model: nn.Module) -> None:
        """Let torch.compile run the forward pass of a model that `wrap` has not had yet."""
        model.compile()

    def evaluation(self, model: nn.Module) -> Callable:
        """Return what to call for a forward pass on held-out data."""
        return model.forward  # not through torch.compile, which would compile a second graph for a few batches

    def forward_backward(
        self, call: Callable, micro_batches: Sequence[dict[str, Any]], n_targets: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Run all micro-batches of a step; gradients are those of the summed losses of all ranks over `n_targets`.

        call: what `wrap` returned; it returns the sum of the losses of a micro-batch and one tensor more.
        micro_batches: the keyword arguments of each call. n_targets: of the whole step, over micro-batches and ranks.
        Returns the two tensors of each call, without gradients.
        """
        outputs = []
        for number, inputs in enumerate(micro_batches, 1):
            with self.accumulating(last=number == len(micro_batches)):
                loss, more = call(**inputs)
                self.backward(loss / max(1, n_targets))
            outputs.append((loss.detach(), more.detach()))
        return outputs

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Return the context of one micro-batch; gradients are exchanged in the last one of a step."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, a share of the mean over the whole step."""
        self.scaler.scale(loss).backward()

    def step(self, max_norm: float) -> float:
        """Clip to `max_norm` (0: only measure), update, and zero the gradients; skip the update when the norm is not
        finite. Return the norm over all parameters before clipping."""
        for part in self.optimizer.parts:
            self.scaler.unscale_(part)
        norm = self.clip(max_norm or float("inf"))
        if norm.isfinite():
            for part in self.optimizer.parts:
                self.scaler.step(part)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm.item()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to `max_norm`; return the norm over all parameters before that."""
        return nn.utils.clip_grad_norm_(self.optimizer.parameters, max_norm)

    # ---- checkpoints

    def state(self, model: nn.Module, optimizer: Optimizers) -> dict[str, Any] | None:
        """Return the optimizer's moments by name of the parameter, and the loss scale, on the main rank; None on the
        others. It is the same for every backend, so that each can go on from what another one has saved."""
        moments = {
            name: {key: self.whole(value) for key, value in values.items()}
            for name, values in optimizer.by_name(model, optimizer.state_dict()).items()
        }
        return {"moments": moments, "scaler": self.scaler.state_dict()} if self.main else None

    def parts(self, model: nn.Module, optimizer: Optimizers) -> tuple[dict, dict[str, dict[str, Any]]]:
        """Return what this rank has of a state that all ranks write: weights by parameter, moments by name of the
        parameter; collective. Each is whole, or a part of it (DTensor); several ranks may have the same."""
        weights = {p: p.detach() for p in model.parameters() if not p.is_meta}
        return weights, optimizer.by_name(model, optimizer.state_dict())

    def load_state(self, model: nn.Module, optimizer: Optimizers, state: dict[str, Any]) -> None:
        """Restore what `state` returned on any backend and any number of ranks; every rank passes the whole of it."""
        # older versions saved the moments by position, under another name
        moments = state["moments"] if "moments" in state else optimizer.by_name(model, state["optimizer"])
        parameters = dict(model.named_parameters())
        mine = {
            name: {key: self.part(parameters[name], value) for key, value in values.items()}
            for name, values in moments.items()
            if name in parameters
        }
        elsewhere = {name: {} for name in moments if name not in parameters}  # `by_position` names them
        optimizer.load_state_dict(optimizer.by_position(model, mine | elsewhere))
        if state["scaler"]:  # empty where the loss was not scaled, in another dtype than float16
            self.scaler.load_state_dict(state["scaler"])

    def whole(self, value: Any) -> Any:
        """Return a whole moment of a parameter from this rank's part; collective. Only the main rank uses it."""
        return value

    def part(self, parameter: nn.Parameter, value: Any) -> Any:
        """Return this rank's part of a whole moment of `parameter`."""
        return value

    def save(self, model: nn.Module, write: Callable[[Path], None], directory: Path | None) -> None:
        """Call `write(directory)` on the main rank, while the model there holds whole weights; on others, `directory`
        is None."""
        if self.main:
            write(directory)

    def load(self, model: nn.Module, read: Callable[[Path], None], directory: Path) -> None:
        """Call `read(directory)`, which copies whole weights into the model."""
        read(directory)

    # ---- messages between ranks

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over the data ranks, in float64.

        Ranks that share a data rank add one value together, not one each. A value above 0 on only one of them adds less
        than itself, but more than 0.
        """
        return list(values)

    def sum_named(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return each number, list or tensor summed over the data ranks, element by element, as numbers and lists.

        One exchange for all of them; every rank passes the same names and shapes in the same order.
        """
        tensors = [torch.as_tensor(value, dtype=torch.float64) for value in values.values()]
        sums = torch.tensor(self.sum(torch.cat([x.flatten() for x in tensors]).tolist()), dtype=torch.float64)
        parts = sums.split([x.numel() for x in tensors])
        return {name: part.view(x.shape).tolist() for name, part, x in zip(values, parts, tensors)}

    def gather(self, value: Any) -> list[Any]:
        """Return one object of every rank, in order of rank."""
        return [value]

    def barrier(self) -> None:
        """Wait until every rank has come to this point."""

    def __enter__(self) -> SingleProcess:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Leave the process group, if there is one."""

"""GaLore (Zhao et al. 2024, arXiv:2403.03507): the optimizer sees gradients in a subspace of low rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optim.adafactor import Adafactor
from optim.adamw import adamw
from optim.args import OptimArgs
from optim.eight_bit import adamw8bit, make_adamw8bit
from optim.groups import groups

Parameters = dict[str, list[nn.Parameter]]


def galore_adamw(parameters: Parameters, args: OptimArgs) -> list[torch.optim.Optimizer]:
    """Return GaLore for the matrices among `parameters` (role -> parameters) with AdamW inside, AdamW for the rest."""

    def inner(low: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(low, args.lr, args.betas, args.eps, weight_decay=0.0)

    return _galore(parameters, args, inner, adamw(parameters | {"matrix": []}, args))


def galore_adamw8bit(parameters: Parameters, args: OptimArgs) -> list[torch.optim.Optimizer]:
    """Return GaLore with bitsandbytes' AdamW inside, whose moments have 8 bits."""

    def inner(low: list[nn.Parameter]) -> torch.optim.Optimizer:
        return make_adamw8bit([{"params": low, "weight_decay": 0.0}], args)

    return _galore(parameters, args, inner, adamw8bit(parameters | {"matrix": []}, args))


def galore_adafactor(parameters: Parameters, args: OptimArgs) -> list[torch.optim.Optimizer]:
    """Return GaLore with Adafactor inside, and Adafactor for the rest; learning rates mean what AdamW's do."""

    def inner(low: list[nn.Parameter]) -> torch.optim.Optimizer:
        return Adafactor(low, args.lr, weight_decay=0.0, relative=False)

    rest = groups(parameters | {"matrix": []}, args)
    return _galore(parameters, args, inner, [Adafactor(rest, args.lr, relative=False)] if rest else [])


def _galore(
    parameters: Parameters, args: OptimArgs, inner: Callable[..., torch.optim.Optimizer], rest: list
) -> list[torch.optim.Optimizer]:
    if not (matrices := parameters["matrix"]):
        raise ValueError(f"--optim.optimizer {args.optimizer} needs matrices to train; an adapter has none: use adamw")
    how = {"rank": args.galore_rank, "every": args.galore_every, "scale": args.galore_scale}
    return [GaLore(matrices, inner, args.lr, args.weight_decay, **how), *rest]


class GaLore(torch.optim.Optimizer):
    """Update (r, c) matrices by an optimizer that sees their gradients in `rank` dimensions.

    The gradient G is projected on its `rank` first singular vectors P of the shorter side, which are found anew at
    every `every`-th step: Pᵀ G (rank, c) where r < c, else G P (r, rank). What the inner optimizer makes of it is
    projected back, times `scale`. inner: makes the optimizer of the projected parameters, whose weights are zero before
    each step; its state is kept in `state[p]["inner"]`.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        inner: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        lr: float,
        weight_decay: float = 0.1,
        *,
        rank: int,
        every: int = 200,
        scale: float = 0.25,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.rank, self.every, self.scale = rank, every, scale
        self.low = {p: nn.Parameter(p.new_empty(0)) for p in params}  # what the inner optimizer updates
        self.inner = inner(list(self.low.values()))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        (group,) = self.param_groups
        moved = [p for p in group["params"] if p.grad is not None]
        for p in moved:
            self._project(p)
        for own in self.inner.param_groups:
            own["lr"] = group["lr"]
        self.inner.step()
        for p in moved:
            low, base = self.low[p], self.state[p]["projection"]
            update = low @ base.T if tall(p) else base @ low  # (r, c); it contains the factor -lr
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=self.scale)
            self.state[p]["inner"] = self.inner.state[low]
            low.grad, low.data = None, p.new_empty(0)  # the memory between two steps is that of the states

    def _project(self, p: nn.Parameter) -> None:
        """Give the low-rank parameter of `p` its projected gradient, zeros as its weights, and its state."""
        state, low = self.state[p], self.low[p]
        count = state.get("count", 0)
        if count % self.every == 0:
            state["projection"] = leading(p.grad, self.rank)
        state["count"], base = count + 1, state["projection"]
        gradient = p.grad @ base if tall(p) else base.T @ p.grad  # (r, rank) or (rank, c)
        low.data = torch.zeros_like(gradient)
        low.grad = gradient
        if "inner" in state:
            self.inner.state[low] = state["inner"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with its dtypes. Raises ValueError for another rank."""
        super().load_state_dict(state_dict)
        (group,) = self.param_groups
        for number, p in enumerate(group["params"]):
            saved = state_dict["state"].get(number)
            if saved is None:
                continue
            if (rank := saved["projection"].shape[1]) != min(self.rank, *p.shape):
                raise ValueError(
                    f"the saved optimizer state has projections to rank {rank}, --optim.galore_rank is {self.rank}: "
                    "resume with the rank that saved it"
                )
            # torch casts what belongs to a float parameter to its dtype, moments in 8 bits, too
            own = {name: each.to(p.device, copy=True) for name, each in saved["inner"].items() if torch.is_tensor(each)}
            self.state[p]["inner"] = saved["inner"] | own


def tall(p: torch.Tensor) -> bool:
    """Return whether a matrix (r, c) is projected on its right singular vectors."""
    return p.shape[0] >= p.shape[1]


def leading(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the first `rank` singular vectors of the shorter side of a matrix, as columns."""
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    # a copy: the other vectors are freed
    return (right[:rank].T if tall(gradient) else left[:, :rank]).to(gradient.dtype, copy=True).contiguous()

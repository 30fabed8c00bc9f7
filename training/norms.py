"""Gradient norms and sizes of activations, layer by layer, for the log (`--train.log_norms N`)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optim.optimizers import Optimizers
from training.protocols import take_metrics

LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.|(?:^|\.)h\.(\d+)\.")  # GPT-2 calls its blocks h


def place_of(name: str) -> str:
    """Return the part of a model that a parameter belongs to: the number of its block, or embed, head, other."""
    if found := LAYER.search(name):
        return f"{int(found[1] or found[2]):02d}"
    return "embed" if "embed" in name or "wte" in name else "head" if "head" in name else "other"


class Norms:
    """Measure the gradients of the steps that are asked for, between the clipping and the update.

    Optimizers call their hooks before they update; the gradients are then clipped, which `values` undoes.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizers, interval: int) -> None:
        """interval: steps between two measurements; 0: none."""
        self.model, self.interval, self.on = model, interval, False
        if not interval:
            return
        names = {p: name for name, p in model.named_parameters()}
        self.squares: dict[str, float] = defaultdict(float)
        self.places = {p: place_of(names[p]) for p in optimizer.parameters}
        for part in optimizer.parts:
            part.register_step_pre_hook(self._look)

    def before(self, step: int, inputs: dict[str, Any]) -> dict[str, float]:
        """Return the sizes of the activations of the first micro-batch where step `step` is measured, else {}."""
        self.on = self.interval > 0 and step % self.interval == 0
        return activations(self.model, inputs) if self.on else {}

    def _look(self, part: torch.optim.Optimizer, *_: Any) -> None:
        if self.on:
            for group in part.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.squares[self.places[p]] += p.grad.float().square().sum().item()

    def values(self, norm: float, max_norm: float) -> dict[str, float]:
        """Return and forget the norm of the gradient of each part of the model, before clipping.

        norm: of the whole gradient before clipping; max_norm: what it was clipped to, 0: not.
        """
        shrunk = max(1.0, (norm + 1e-6) / max_norm) if max_norm else 1.0  # as in torch's clip_grad_norm_
        found = {f"grad_norm/{place}": square**0.5 * shrunk for place, square in sorted(self.squares.items())}
        self.squares.clear()
        return found


@torch.no_grad()
def activations(model: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """Return the root mean square of the output of each block on some rows, without dropout.

    inputs: keyword arguments of a forward pass.
    """
    blocks = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), ())
    found: dict[str, float] = {}

    def look(number: int) -> Callable:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            found[f"activation/{number:02d}"] = tensor.float().square().mean().sqrt().item()

        return hook

    hooks = [block.register_forward_hook(look(number)) for number, block in enumerate(blocks)]
    was_training = model.training
    model.eval()
    try:
        model.forward(**inputs)  # not through torch.compile, which does not see these hooks
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    take_metrics(model)
    return found

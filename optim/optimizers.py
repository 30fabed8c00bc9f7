"""The optimizers of a model: the role of each parameter, and which optimizer it gets.

A new optimizer is a file with a function, a line in `OPTIMIZERS` and its name in `args.OPTIMIZERS`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optim.adafactor import adafactor
from optim.adamw import adamw
from optim.args import OptimArgs
from optim.eight_bit import adamw8bit
from optim.galore import galore_adafactor, galore_adamw, galore_adamw8bit
from optim.lion import lion
from optim.muon import muon

# name -> function of (parameters by role, args) that returns optimizers over all of them
OPTIMIZERS: dict[str, Callable[..., list[torch.optim.Optimizer]]] = {
    "muon": muon,
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "lion": lion,
    "adafactor": adafactor,
    "galore_adamw": galore_adamw,
    "galore_adamw8bit": galore_adamw8bit,
    "galore_adafactor": galore_adafactor,
}
# a rate of its own -> the role that it is of, and what a message says is missing
RATIOS = {
    "lora_lr_ratio": ("lora_B", "an adapter, found no trainable lora_B"),
    "embed_lr_ratio": ("outer", "an embedding or a head to train, found none"),
    "norm_lr_ratio": ("vector", "1-D parameters to train, found none"),
}


def build_optimizer(model: nn.Module, args: OptimArgs) -> Optimizers:
    """Return the optimizers of a model's trainable parameters.

    A tied parameter is updated once; weight decay is not used on 1-D parameters. Raises ValueError when nothing
    trains, and for a rate of parameters that do not train, such as --optim.lora_lr_ratio without an adapter.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    # embeddings are found by their class: their names differ between models
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = defaultdict(list)  # role -> parameters
    for name, p in trainable.items():
        parameters["outer" if p in tables else role(name, p)].append(p)
    for name, (kind, what) in RATIOS.items():
        if getattr(args, name) != 1.0 and not parameters[kind]:
            raise ValueError(f"--optim.{name} {getattr(args, name):g} needs {what}: remove it")
    return Optimizers(OPTIMIZERS[args.optimizer](parameters, args))


def role(name: str, p: nn.Parameter) -> str:
    """Return the role of a parameter that is not an embedding: matrix, outer (not for Muon), lora_B or vector."""
    if p.dim() != 2:
        return "vector"
    if name.endswith("lora_B"):
        return "lora_B"
    # Muon is not used for embeddings and heads (their rows act independently; GPT-NeoX calls its head embed_out), nor
    # for LoRA factors (orthogonal steps of A and B do not make an orthogonal step of B A), nor for CLEX (proj_down
    # starts at zero, and Muon's steps have one size, however small the gradient).
    return "outer" if any(part in name for part in ("lm_head", "embed_out", "lora_", "rope.proj_")) else "matrix"


class Optimizers:
    """Several optimizers over disjoint parameters, with the interface of one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        """Take the optimizers; their present learning rates become the peaks of the schedule."""
        self.parts = parts
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def set_lr(self, factor: float) -> None:
        """Set every group to `factor` times its peak learning rate."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def by_name(self, model: nn.Module, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the moments in what `state_dict` returned, as name of the parameter in `model` -> name -> value."""
        names = {p: name for name, p in model.named_parameters()}
        pairs = ((part, saved["state"]) for part, saved in zip(self.parts, state["parts"]))
        return {names[p]: saved[i] for part, saved in pairs for i, p in enumerate(parameters_of(part)) if i in saved}

    def by_position(self, model: nn.Module, moments: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return what `load_state_dict` takes from the moments of the parameters of `model` by name.

        Raises ValueError where they are those of other parameters.
        """
        names = {p: name for name, p in model.named_parameters()}
        if strangers := sorted(moments.keys() - {names[p] for p in self.parameters}):
            raise ValueError(f"the saved optimizer state has moments of {strangers[0]}, which is not trained here")
        parts = []
        for part in self.parts:
            numbered = {i: moments[names[p]] for i, p in enumerate(parameters_of(part)) if names[p] in moments}
            parts.append({"state": numbered, "param_groups": part.state_dict()["param_groups"]})
        return {"parts": parts}

    def replace(self, new: dict[nn.Parameter, nn.Parameter | None]) -> None:
        """Train other parameters in place of those that are keys of `new` (None: not here); only before the first
        step."""
        for group in self.param_groups:
            group["params"] = [p for p in (new.get(p, p) for p in group["params"]) if p is not None]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the moments of `state`; learning rates, decay and other settings keep their present values.

        Raises ValueError for the state of another set of optimizers.
        """
        if len(state["parts"]) != len(self.parts):
            raise ValueError(
                f"the saved optimizer state has {len(state['parts'])} parts, "
                f"--optim.optimizer makes {len(self.parts)}: resume with the optimizer that saved it"
            )
        for part, saved in zip(self.parts, state["parts"]):
            # load_state_dict would replace the settings of the groups, too
            settings = [dict(group) for group in part.param_groups]
            part.load_state_dict(saved)
            for group, own in zip(part.param_groups, settings):
                group.update(own)


def parameters_of(part: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of one optimizer in the order of the numbers in its `state_dict`."""
    return [p for group in part.param_groups for p in group["params"]]

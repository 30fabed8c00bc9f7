"""Optimizers and learning-rate schedules: which parameters get what, and how fast, as pure functions of the step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from optim.args import OptimArgs
from optim.muon import Muon


def build_optimizer(model: nn.Module, args: OptimArgs) -> Optimizers:
    """The optimizers of a model's trainable parameters; tied parameters are seen once, 1-D ones are not decayed."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds = defaultdict(list)
    for name, p in trainable.items():
        kinds["outer" if p in tables else _kind(name, p)].append(p)
    if args.lora_lr_ratio != 1.0 and not kinds["lora_B"]:
        raise ValueError("lora_lr_ratio is for adapters, and the model has no trainable lora_B")
    matrices = kinds["matrix"]
    parts: list[torch.optim.Optimizer] = []
    if args.optimizer == "muon" and matrices:
        parts.append(Muon(matrices, args.muon_lr, args.weight_decay, args.momentum))
        matrices = []
    groups = [
        {"params": matrices + kinds["outer"], "weight_decay": args.weight_decay},
        {"params": kinds["lora_B"], "weight_decay": args.weight_decay, "lr": args.lr * args.lora_lr_ratio},
        {"params": kinds["vector"], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") for p in trainable.values())
        parts.append(torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, eps=args.eps, fused=fused))
    return Optimizers(parts)


def _kind(name: str, p: nn.Parameter) -> str:
    """Which optimizer and settings a parameter gets that is no embedding."""
    if p.dim() != 2:
        return "vector"
    if name.endswith("lora_B"):
        return "lora_B"
    # Rows of embeddings, which have no name of their own in all models, and of heads (GPT-NeoX calls its own embed_out)
    # are looked up or compared one by one: no matrix to orthogonalise. Of an adapter it is the product B A that moves a
    # weight, and orthogonal steps of B and of A are no such step of their product. CLEX's proj_down starts at zero, and
    # a step of Muon's has one size whatever the gradient's.
    return "outer" if any(part in name for part in ("lm_head", "embed_out", "lora_", "rope.proj_")) else "matrix"


class Optimizers:
    """Several optimizers over disjoint parameters, behind the interface of one."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the moments; learning rates, decay and the like stay what they were set to here."""
        if len(state["parts"]) != len(self.parts):
            raise ValueError("the saved optimizer state is of another optimizer; resume with the one it was made by")
        for part, saved in zip(self.parts, state["parts"]):
            settings = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
            part.load_state_dict(saved)
            for group, own in zip(part.param_groups, settings):
                group.update(own)

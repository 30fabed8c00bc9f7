"""Optimizers and learning-rate schedules: which parameters get what, and how fast, as pure functions of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimArgs:
    """Optimizer and schedule."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon on the matrices of the blocks, AdamW on embeddings, head, norms and adapters; adamw: on everything"""
    lr: float = 4e-3
    """peak learning rate of AdamW"""
    muon_lr: float = 6e-3
    """peak learning rate of Muon, scaled so that its updates have the size of AdamW's"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    weight_decay: float = 0.1
    """decoupled weight decay, on matrices only"""
    momentum: float = 0.95
    """Muon's momentum"""
    lora_lr_ratio: float = 1.0
    """learning rate of an adapter's lora_B as a multiple of lr, which lora_A has; LoRA+ (Hayou 2024) takes 16"""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """shape after the warm-up; wsd: constant, then linear over the last `decay_share` of the steps"""
    warmup_steps: int = 20
    """optimizer steps of linear warm-up"""
    decay_share: float = 0.5
    """share of all steps that wsd spends decaying"""
    min_lr_ratio: float = 0.0
    """learning rate at the end, as a share of the peak"""

    def __post_init__(self) -> None:
        """Raises ValueError on a number that no schedule or optimizer makes sense of."""
        for name in ("lr", "muon_lr", "eps", "weight_decay", "warmup_steps", "lora_lr_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} should be 0 or more, and finite, found {getattr(self, name)}")
        shares = {"momentum": self.momentum, "decay_share": self.decay_share, "min_lr_ratio": self.min_lr_ratio}
        for name, value in shares.items() | {("betas", beta) for beta in self.betas}:
            if not 0 <= value <= 1:
                raise ValueError(f"{name} should lie between 0 and 1, found {value}")


def lr_factor(step: int, total_steps: int, args: OptimArgs) -> float:
    """Share of the peak learning rate for optimizer step `step` (from 0) of `total_steps`."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    if args.schedule == "constant":
        return 1.0
    flat_until = total_steps * (1 - args.decay_share) if args.schedule == "wsd" else 0
    begin = max(args.warmup_steps, flat_until)
    progress = min(1.0, max(0.0, (step - begin) / max(1, total_steps - begin)))
    curve = 0.5 * (1 + math.cos(math.pi * progress)) if args.schedule == "cosine" else 1 - progress
    return args.min_lr_ratio + (1 - args.min_lr_ratio) * curve


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


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan 2024, kellerjordan.github.io/posts/muon), for 2-D parameters.

    The update of a matrix (r, c) is scaled by 0.2 sqrt(max(r, c)), which gives it the root mean square of a typical
    AdamW update (Liu et al. 2025, arXiv:2502.16982), so that AdamW's learning rates and decay carry over. Matrices of
    one shape are orthogonalised together.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon takes matrices, found a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in params])  # (n, r, c)
                updates = orthogonalize(updates).to(params[0].dtype)
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _momentum(self, p: nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)  # Nesterov


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly U Vᵀ for each matrix U S Vᵀ of `matrices` (n, r, c): Newton-Schulz in bfloat16, where it is stable.

    The quintic's coefficients trade exactness for speed: singular values land in about [0.7, 1.2], not on 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, r, r), r <= c
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

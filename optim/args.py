"""The flags of optimizer and schedule, `--optim.*`; without torch, for the argument parser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

OPTIMIZERS = ("muon", "adamw")  # keys of optimizers.OPTIMIZERS


@dataclass(frozen=True)
class OptimArgs:
    """Optimizer and schedule."""

    optimizer: Literal[OPTIMIZERS] = "muon"  # type: ignore[valid-type]
    """muon: Muon for the matrices of the blocks, AdamW for embeddings, head, norms and adapters; adamw: for all"""
    lr: Annotated[float, (0, 10)] = 4e-3
    """peak learning rate of AdamW"""
    muon_lr: Annotated[float, (0, 10)] = 6e-3
    """peak learning rate of Muon, scaled so that its updates have the size of AdamW's"""
    betas: Annotated[tuple[float, float], (0, 0.999999)] = (0.9, 0.95)
    """decay rates of AdamW's two moments"""
    eps: Annotated[float, (0, 1)] = 1e-8
    """epsilon of AdamW"""
    weight_decay: Annotated[float, (0, 100)] = 0.1
    """decoupled weight decay, on matrices only"""
    momentum: float = 0.95
    """momentum of Muon"""
    lora_lr_ratio: Annotated[float, (0, 10000)] = 1.0
    """learning rate of an adapter's lora_B as a multiple of lr, the rate of lora_A; LoRA+ (Hayou 2024) uses 16"""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """shape after the warm-up; wsd: constant, then linear over the last `decay_share` of the steps"""
    warmup_steps: Annotated[int, (0, 1000000000)] = 20
    """number of optimizer steps of linear warm-up"""
    decay_share: float = 0.5
    """share of all steps in which wsd decays"""
    min_lr_ratio: float = 0.0
    """learning rate at the end, as a share of the peak"""

    def __post_init__(self) -> None:
        """Raise ValueError for a number out of range."""
        for name in ("lr", "muon_lr", "eps", "weight_decay", "warmup_steps", "lora_lr_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--optim.{name} should be 0 or more, and finite, found {getattr(self, name)}")
        shares = {"momentum": self.momentum, "decay_share": self.decay_share, "min_lr_ratio": self.min_lr_ratio}
        for name, value in shares.items() | {("betas", beta) for beta in self.betas}:
            if not 0 <= value <= 1:
                raise ValueError(f"--optim.{name} should lie between 0 and 1, found {value}")

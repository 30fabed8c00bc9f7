"""The flags of optimizer and schedule, `--optim.*`; without torch, for the argument parser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

GALORE = ("galore_adamw", "galore_adamw8bit", "galore_adafactor")
OPTIMIZERS = ("muon", "adamw", "adamw8bit", "lion", "adafactor", *GALORE)  # keys of optimizers.OPTIMIZERS
WITH_EPS = ("muon", "adamw", "adamw8bit", *GALORE[:2])  # AdamW of some or all parameters
WITH_BETAS = (*WITH_EPS, "lion")
SCHEDULES = ("wsd", "cosine", "linear", "constant", "inverse_sqrt")


@dataclass(frozen=True)
class OptimArgs:
    """Optimizer and schedule."""

    optimizer: Literal[OPTIMIZERS] = "muon"  # type: ignore[valid-type]
    """muon: Muon for the matrices of the blocks, AdamW for the rest; adamw: AdamW for all parameters;
    adamw8bit: with moments of 8 bits (bitsandbytes); lion: one moment; adafactor: second moments of rows and columns;
    galore_*: the matrices of the blocks in a subspace of `galore_rank` dimensions. docs/training.md compares them"""
    lr: Annotated[float, (0, 10)] = 4e-3
    """peak learning rate of all but Muon; lion takes a third to a tenth of AdamW's, adafactor's is a share of the root
    mean square of each weight matrix"""
    muon_lr: Annotated[float, (0, 10)] = 6e-3
    """peak learning rate of Muon, scaled so that its updates have the size of AdamW's"""
    betas: Annotated[tuple[float, float], (0, 0.999999)] = (0.9, 0.95)
    """decay rates of AdamW's two moments; lion: of its update and of its momentum"""
    eps: Annotated[float, (0, 1)] = 1e-8
    """epsilon of AdamW"""
    weight_decay: Annotated[float, (0, 100)] = 0.1
    """decoupled weight decay, on matrices only"""
    momentum: float = 0.95
    """momentum of Muon"""
    lora_lr_ratio: Annotated[float, (0, 10000)] = 1.0
    """learning rate of an adapter's lora_B as a multiple of lr, the rate of lora_A; LoRA+ (Hayou 2024) uses 16"""
    embed_lr_ratio: Annotated[float, (0, 10000)] = 1.0
    """learning rate of embeddings and head as a multiple of lr"""
    norm_lr_ratio: Annotated[float, (0, 10000)] = 1.0
    """learning rate of 1-D parameters (norms, biases) as a multiple of lr"""
    galore_rank: Annotated[int, (1, 1000000)] = 32
    """dimensions of the subspace in which galore_* see a gradient; a quarter of the width is usual"""
    galore_every: Annotated[int, (1, 1000000000)] = 200
    """steps between two subspaces"""
    galore_scale: Annotated[float, (0, 10000)] = 0.25
    """factor of the update that is projected back"""
    schedule: Literal[SCHEDULES] = "wsd"  # type: ignore[valid-type]
    """shape after the warm-up, in optimizer steps; wsd: constant, then linear over the last `decay_share` of the steps;
    inverse_sqrt: the peak times sqrt(warmup_steps / step)"""
    warmup_steps: Annotated[int, (0, 1000000000)] = 20
    """number of optimizer steps of linear warm-up"""
    decay_share: float = 0.5
    """share of all steps in which wsd decays"""
    min_lr_ratio: float = 0.0
    """learning rate at the end, as a share of the peak"""

    def __post_init__(self) -> None:
        """Raise ValueError for a number out of range."""
        ratios = ("lora_lr_ratio", "embed_lr_ratio", "norm_lr_ratio", "galore_scale")
        for name in ("lr", "muon_lr", "eps", "weight_decay", "warmup_steps", *ratios):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--optim.{name} should be 0 or more, and finite, found {getattr(self, name)}")
        shares = {"momentum": self.momentum, "decay_share": self.decay_share, "min_lr_ratio": self.min_lr_ratio}
        for name, value in shares.items() | {("betas", beta) for beta in self.betas}:
            if not 0 <= value <= 1:
                raise ValueError(f"--optim.{name} should lie between 0 and 1, found {value}")

"""The settings of an adapter: the registry of methods, the flags, and what PEFT's `adapter_config.json` records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

METHODS: dict[str, dict[str, Any]] = {  # name on the command line -> how its LoraSpec differs from plain LoRA's
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"pissa": True},
}


@dataclass(frozen=True)
class LoraSpec:
    """One adapter. `targets` as in PEFT: a regular expression over whole module names, or ends of names."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    train: tuple[str, ...] = ()  # whole names of modules trained in full (PEFT: modules_to_save)
    rslora: bool = False
    dora: bool = False
    pissa: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"the rank r of an adapter should be at least 1, found {self.r}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha should be above 0 and finite, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"an adapter's dropout should lie in [0, 1), found {self.dropout}")
        if self.dora and self.pissa:
            raise ValueError("dora and pissa do not combine: both redefine the base weight; choose one")

    @property
    def scaling(self) -> float:
        """Factor of B A: alpha / r; in rsLoRA alpha / sqrt(r), so that updates do not shrink as r grows."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True)
class LoraArgs:
    """Adapters instead of full fine-tuning."""

    method: Literal["none", "lora", "rslora", "dora", "pissa"] = "none"
    """none: train all weights, without an adapter; lora (Hu 2021), rslora (Kalajdzievski 2023), dora (Liu 2024), pissa
    (Meng 2024)"""
    r: int = 8
    """rank of the adapters"""
    alpha: float = 16.0
    """the update is scaled by alpha / r (rslora: alpha / sqrt(r))"""
    dropout: float = 0.0
    """dropout on the input of the adapters during training"""
    targets: str = "attention,mlp"
    """layers that get an adapter, separated by commas: attention, mlp, linear (all but the head), embedding, head, or
    ends of module names; or one regular expression over whole module names"""
    train_embed_norm: bool = False
    """also train embeddings and norms in full (LongLoRA), and the head where it is tied to the embedding"""
    base: Literal["full", "nf4", "fp4", "int8"] = "full"
    """how the frozen weights of the linear layers are stored. full: in the dtype of the training; nf4, fp4: in 4 bits
    (QLoRA; needs bitsandbytes); int8: in 8 bits"""
    double_quant: bool = True
    """nf4, fp4: quantize the scales as well, which then take 0.127 instead of 0.5 bits for each weight"""

    def __post_init__(self) -> None:
        """Raise ValueError on an unknown method or a number out of range. Which flags go together: tuning/args.py."""
        if self.method not in ("none", *METHODS):
            raise ValueError(f"unknown method {self.method!r}; there are {', '.join(METHODS)}")
        LoraSpec(self.r, self.alpha, self.dropout)

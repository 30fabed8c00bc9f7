"""The methods, the description of one adapter, and the flags `--lora.*`; without torch, for the argument parser.

A new method is a file with a class, a field of `LoraSpec`, a line in `METHODS` and one in `inject.CLASSES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from quant.kinds import KINDS

METHODS: dict[str, dict[str, Any]] = {  # name on the command line -> fields of LoraSpec that differ from plain LoRA
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"pissa": True},
}


@dataclass(frozen=True)
class LoraSpec:
    """Description of one adapter, as PEFT's `adapter_config.json` records it."""

    r: int = 8
    """rank"""
    alpha: float = 16.0
    """numerator of the scaling"""
    dropout: float = 0.0
    """probability of dropout on the input of the adapter"""
    targets: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """layers with an adapter: a regular expression over whole module names, or ends of names"""
    train: tuple[str, ...] = ()
    """whole names of modules that are trained in full (PEFT: modules_to_save)"""
    rslora: bool = False
    """whether scaling is alpha / sqrt(r)"""
    dora: bool = False
    """whether the length of the weight's rows is trained, too"""
    pissa: bool = False
    """whether the factors are initialized with singular directions of the weight"""
    layers: tuple[tuple[str, int, float], ...] = ()
    """whole name, rank and alpha of each layer that has others (PEFT: rank_pattern and alpha_pattern)"""

    def __post_init__(self) -> None:
        """Raise ValueError for a number out of range, and for dora with pissa."""
        if self.r < 1:
            raise ValueError(f"r should be at least 1, found {self.r}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha should be above 0 and finite, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout should lie in [0, 1), found {self.dropout}")
        if self.dora and self.pissa:
            raise ValueError("dora and pissa do not combine: both redefine the base weight; choose one")

    def of_layer(self, path: str) -> LoraSpec:
        """Return the spec with the rank and alpha of one layer."""
        r, alpha = next((own for name, *own in self.layers if name == path), (self.r, self.alpha))
        return replace(self, r=r, alpha=alpha)

    @property
    def scaling(self) -> float:
        """Return the factor on B A: alpha / r; in rsLoRA alpha / sqrt(r), whose updates do not shrink as r grows."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True)
class LoraArgs:
    """Adapters instead of full fine-tuning."""

    method: Literal[("none", *METHODS)] = "none"  # type: ignore[valid-type]
    """none: train all weights, without an adapter; lora (Hu 2021), rslora (Kalajdzievski 2023), dora (Liu 2024), pissa
    (Meng 2024)"""
    r: int = 8
    """rank of the adapters"""
    alpha: float = 16.0
    """the update is scaled by alpha / r (rslora: alpha / sqrt(r))"""
    dropout: float = 0.0
    """probability of dropout on the input of the adapters, in training"""
    targets: str = "attention,mlp"
    """layers that get an adapter, separated by commas: attention, mlp, linear (all but the head), embedding, head, or
    ends of module names; or one regular expression over whole module names"""
    train_embed_norm: bool = False
    """also train embeddings and norms in full (LongLoRA), and the head where it is tied to the embedding"""
    base: Literal[("full", *KINDS)] = "full"  # type: ignore[valid-type]
    """how the frozen weights of the linear layers are stored. full: in the dtype of the training; nf4, fp4: in 4 bits
    (QLoRA; needs bitsandbytes); int8: in 8 bits"""
    double_quant: bool = True
    """nf4, fp4: quantize the scales as well, which then take 0.127 instead of 0.5 bits for each weight"""

    def __post_init__(self) -> None:
        """Raise ValueError on an unknown method or a number out of range. Which flags go together: tuning/args.py."""
        if self.method not in ("none", *METHODS):
            raise ValueError(f"--lora.method should be one of none, {', '.join(METHODS)}, found {self.method!r}")
        try:
            LoraSpec(self.r, self.alpha, self.dropout)  # checks the numbers
        except ValueError as error:
            raise ValueError(f"--lora.{error}") from None

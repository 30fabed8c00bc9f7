"""What an adapter is: the registry of methods, and what of it PEFT's `adapter_config.json` records."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
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
        """What multiplies B A: alpha / r; in rsLoRA alpha / sqrt(r), whose updates do not shrink as r grows."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True)
class LoraArgs:
    """Adapters instead of full fine-tuning."""

    method: Literal["none", "lora", "rslora", "dora", "pissa"] = "none"
    """none: train all parameters; lora (Hu 2021), rslora (Kalajdzievski 2023), dora (Liu 2024), pissa (Meng 2024)"""
    r: int = 8
    """rank"""
    alpha: float = 16.0
    """the update is scaled by alpha / r (rslora: alpha / sqrt(r))"""
    dropout: float = 0.0
    """on the input of the adapters, in training"""
    targets: str = "attention,mlp"
    """any of attention, mlp, linear (all but the head), embedding, head, ends of module names, with commas between;
    or one regular expression over whole module names"""
    train_embed_norm: bool = False
    """train embeddings and norms in full besides (LongLoRA); where the head is tied to the embedding, it too"""
    base: Literal["full", "nf4", "fp4", "int8"] = "full"
    """how the frozen weights of the linear layers are kept; full: in the dtype of the training; nf4 is QLoRA (nf4 and
    fp4 take bitsandbytes)"""
    double_quant: bool = True
    """nf4, fp4: quantize the scales too, 0.127 instead of 0.5 bits a weight"""

    def __post_init__(self) -> None:
        if self.method == "none":
            if self.base != "full":
                raise ValueError(
                    f"weights kept in {self.base} cannot be trained in full: "
                    "choose an adapter with --lora.method lora, or --lora.base full"
                )
            if self.train_embed_norm:
                raise ValueError("train_embed_norm goes with an adapter (--lora.method); without one everything trains")
            if others := [f.name for f in fields(self) if getattr(self, f.name) != f.default]:
                raise ValueError(f"--lora.{others[0]} is of an adapter: name one with --lora.method, or leave it out")
        elif self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; there are {', '.join(METHODS)}")
        if self.method == "pissa" and self.base != "full":
            raise ValueError("pissa changes the base weights, and quantized ones are frozen: use lora or dora there")
        if not self.double_quant and self.base not in ("nf4", "fp4"):
            raise ValueError(f"double_quant is of the scales of nf4 and fp4, not of {self.base}: leave it out")
        if self.method != "none":
            LoraSpec(self.r, self.alpha, self.dropout)  # refuses numbers that make no sense

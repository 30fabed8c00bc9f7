"""LoRA and its variants on any tree of `nn.Linear` and `nn.Embedding`.

adapters.apply(model, LoraArgs(method="dora"))          freeze the model, add an adapter (and quantize the base)
adapters.set_active(model, "poet")                      switch to another adapter; None: to the base model
with adapters.disabled(model): ...                      use the base model inside the block
adapters.merge(model), adapters.unmerge(model)          one plain weight for each layer; and back, bit for bit

checkpoint/peft.py writes adapters as PEFT directories, and loads them.
"""

from __future__ import annotations

import torch
from torch import nn

from lora.inject import active, describe, disabled, inject, merge, merge_for_good, set_active, unmerge
from lora.neftune import neftune
from lora.spec import METHODS, LoraArgs, LoraSpec
from lora.targets import embeddings_and_norms, parse_targets
from quant.replace import keep_base_in, quantize_base

__all__ = [
    "METHODS",
    "LoraArgs",
    "LoraSpec",
    "active",
    "apply",
    "describe",
    "disabled",
    "inject",
    "keep_base_in",
    "merge",
    "merge_for_good",
    "neftune",
    "quantize_base",
    "set_active",
    "unmerge",
]


def apply(model: nn.Module, args: LoraArgs, dtype: torch.dtype | None = None) -> None:
    """Quantize and freeze `model` and add the adapter "default", as `args` say; method none: leave all as it is.

    dtype: of the matrix products in training, None when unknown. Frozen weights that are not quantized are cast to it,
    except for PiSSA, which changes them: the products are the same, at half the memory.
    """
    if args.method == "none":
        return
    spec = LoraSpec(
        args.r,
        args.alpha,
        args.dropout,
        parse_targets(model, args.targets),
        embeddings_and_norms(model) if args.train_embed_norm else (),
        **METHODS[args.method],
    )
    quantize_base(model, args.base, args.double_quant)
    if args.base == "full" and dtype is not None and not spec.pissa:
        keep_base_in(model, dtype)
    inject(model, spec)

"""Put quantized layers into a tree of modules, in the places of linear ones."""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn

from quant.four_bit import FourBitLinear
from quant.int8 import Int8Linear
from quant.linear import QuantizedLinear


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer without any adapter, quantized or not."""
    return layer.dequantize() if isinstance(layer, QuantizedLinear) else layer._parameters["weight"]


def quantize_base(model: nn.Module, kind: str, double_quant: bool = True) -> None:
    """Put every linear layer of `model` but the head (embeddings and norms stay, too) into `kind`, nf4, fp4 or int8;
    before `inject`. "full": leave them.

    Raises ValueError when bitsandbytes is missing, or the model has adapters already.
    """
    if kind == "full":
        return
    if kind in ("nf4", "fp4") and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"weights in {kind} need bitsandbytes: pip install 'bitsandbytes>=0.50', or say int8")
    if kind not in ("nf4", "fp4", "int8"):
        raise ValueError(f"unknown quantization {kind!r} of the base; there are nf4, fp4, int8")
    if any(hasattr(module, "lora") for module in model.modules()):
        raise ValueError("the model has adapters already: quantize its base before they are added")
    # It warns that a product for other uses, which it would fetch from a model hub, is not there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for path, module in base_layers(model):
        module.requires_grad_(False)
        layer = Int8Linear(module) if kind == "int8" else FourBitLinear(module, kind, double_quant)
        replace(model, path, layer)


def kind_of_base(model: nn.Module) -> tuple[str, bool]:
    """What `quantize_base` made of a model: the kind, "full" if nothing, and whether scales were quantized, too."""
    layers = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return next(((layer.kind, layer.double) for layer in layers), ("full", False))


def keep_base_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of the layers that `quantize_base` would quantize in `dtype`, frozen, where that is smaller."""
    for _, module in base_layers(model):
        if dtype.itemsize < module.weight.dtype.itemsize:
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)


def base_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Every linear layer of a model but the head, by name."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and not is_head(path)]


def is_head(path: str) -> bool:
    """Whether a module makes the logits: it is not quantized, and its loss may be computed from its weight."""
    return path.rpartition(".")[2] in ("lm_head", "embed_out")


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` into the tree of `model` under the name `path`, in the mode of what was there."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    module.train(getattr(holder, name).training)
    setattr(holder, name, module)

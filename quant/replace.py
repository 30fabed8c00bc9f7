"""Replace linear layers in a tree of modules by quantized ones. A new quantizer is a file with a class, a line in
`QUANTIZERS` and its name in `kinds.KINDS`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from quant.four_bit import FourBitLinear
from quant.int8 import Int8Linear
from quant.kinds import KINDS
from quant.linear import QuantizedLinear

QUANTIZERS: dict[str, Callable[..., QuantizedLinear]] = {  # name -> class, which is called with the linear layer
    "nf4": partial(FourBitLinear, kind="nf4"),
    "fp4": partial(FourBitLinear, kind="fp4"),
    "int8": Int8Linear,
}
assert QUANTIZERS.keys() == KINDS.keys()


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """Return the weight (out, in) of a layer without its adapter; of a quantized layer, dequantized to float32."""
    return layer.dequantize() if isinstance(layer, QuantizedLinear) else layer._parameters["weight"]


def quantize_base(model: nn.Module, kind: str, double_quant: bool = True) -> None:
    """Quantize every linear layer of `model` except the head, and freeze it; embeddings and norms stay as they are.

    kind: "full" (no change) or a key of `QUANTIZERS`; double_quant: quantize the scales, too, if the kind can. Call it
    before `lora.inject`. Raises ValueError for an unknown kind, a missing package, or a model with adapters.
    """
    if kind == "full":
        return
    if kind not in KINDS:
        raise ValueError(f"--lora.base should be one of full, {', '.join(KINDS)}, found {kind!r}")
    need_package(kind, f"--lora.base {kind}")
    if any(hasattr(module, "lora") for module in model.modules()):
        raise ValueError("the model has adapters already: quantize its base before they are added")
    if bits := next((layer.kind for _, layer in base_layers(model) if hasattr(layer, "kind")), None):
        raise ValueError(f"--lora.base {kind}: the model is trained in few bits ({bits}), which others cannot replace")
    options = {"double": double_quant} if KINDS[kind].double_quant else {}
    for path, module in base_layers(model):
        module.requires_grad_(False)  # the bias, which the quantized layer takes over, is frozen, too
        replace(model, path, QUANTIZERS[kind](module, **options))


def need_package(kind: str, what: str) -> None:
    """Raise ValueError, whose subject is `what`, where the package of a kind is not installed."""
    package = KINDS[kind].package
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs {package}, which is not installed: bash setup.sh --extra bnb; or choose int8")


def kind_of_base(model: nn.Module) -> tuple[str, bool]:
    """Return the kind and double_quant of the `quantize_base` that a model went through; ("full", False) for none.

    Layers that were quantized in the model's own directory do not count: they come back whenever it is loaded.
    """
    layers = (m for m in model.modules() if isinstance(m, QuantizedLinear) and m.kind in KINDS and not m.in_files)
    return next(((layer.kind, layer.double) for layer in layers), ("full", False))


def refuse_quantized(model: nn.Module, what: str) -> None:
    """Raise ValueError where a layer of `model` is quantized, since `what` needs the full weights."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            f"the weights of this model are quantized, and {what}: take the model that they were quantized "
            "from, or train an adapter (fine_tuning.py --lora.method lora)"
        )


def keep_base_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that `quantize_base` would quantize to `dtype`, and freeze them; leave those that would not get
    smaller."""
    for _, module in base_layers(model):
        if dtype.itemsize < module.weight.dtype.itemsize:
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)


def base_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return names and modules of all linear layers of a model except the head."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and not is_head(path)]


def is_head(path: str) -> bool:
    """Return whether the module computes the logits. It is not quantized: the loss reads its weight directly."""
    return path.rpartition(".")[2] in ("lm_head", "embed_out")


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` into the tree of `model` under the name `path`, in the training mode of the module it replaces."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    module.train(getattr(holder, name).training)
    setattr(holder, name, module)

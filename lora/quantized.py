"""Frozen linear layers in 4 or 8 bits, with gradients to their input: the base of QLoRA (Dettmers 2023, 2305.14314).

nf4, fp4: blocks of 64 weights share a scale, each weight is one of 16 levels; bitsandbytes does the coding. With double
quantization the scales are kept in 8 bits too. int8: each output row has a scale of its own.
A layer is unpacked where it is used and again in the backward pass, so that no dense copy outlives its product.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

BLOCK, SCALES_BLOCK = 64, 256  # weights that share a scale; scales that share one


class QuantizedLinear(nn.Module):
    """In the place of a linear layer: `dequantize(dtype)` is its weight (out, in). Scales are kept as bytes, so that
    `model.to(bfloat16)` leaves them as they are."""

    kind: str
    double = False

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.origin = base.in_features, base.out_features, type(base)
        self.bias = base.bias

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (out, in)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dense(self, weight: torch.Tensor) -> nn.Linear:
        """A layer of the kind this one was made from, holding `weight`."""
        layer = self.origin(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class FourBitLinear(QuantizedLinear):
    """NF4 or FP4, packed as bitsandbytes does: the first value of a pair in the high half of a byte."""

    def __init__(self, base: nn.Linear, kind: Literal["nf4", "fp4"], double: bool) -> None:
        super().__init__(base)
        from bitsandbytes import functional as bnb

        packed, state = bnb.quantize_4bit(
            base.weight.detach().float(), blocksize=BLOCK, quant_type=kind, compress_statistics=double
        )
        self.kind, self.double = kind, double
        self.register_buffer("packed", packed)  # (out * in / 2, 1) uint8
        self.register_buffer("absmax", state.absmax.view(torch.uint8))  # one scale a block, in 1 or 4 bytes
        if double:
            self.register_buffer("nested_absmax", state.state2.absmax.view(torch.uint8))
            self.register_buffer("offset", state.offset.reshape(1).view(torch.uint8))  # the mean of the scales

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        from bitsandbytes import functional as bnb

        absmax, nested, offset = self.absmax, None, None
        if self.double:
            nested_absmax, offset = self.nested_absmax.view(torch.float32), self.offset.view(torch.float32)[0]
            code = scale_levels(absmax.device)
            nested = bnb.QuantState(nested_absmax, code=code, blocksize=SCALES_BLOCK, dtype=torch.float32)
        else:
            absmax = absmax.view(torch.float32)
        # As one row: bitsandbytes' CPU kernel begins a new block with every row of a matrix, which quantizing does not.
        shape = torch.Size((1, 2 * self.packed.numel()))
        kind = {"quant_type": self.kind, "blocksize": BLOCK, "dtype": torch.float32}
        state = bnb.QuantState(absmax, shape=shape, offset=offset, state2=nested, **kind)
        row = bnb.dequantize_4bit(self.packed, state).flatten()
        return row[: self.out_features * self.in_features].view(self.out_features, self.in_features).to(dtype)


def scale_levels(device: torch.device) -> torch.Tensor:
    """The 256 levels of a scale in double quantization, dense near zero (Dettmers 2015, arXiv:1511.04561)."""
    if device not in _levels:
        from bitsandbytes import functional as bnb

        _levels[device] = bnb.create_dynamic_map().to(device)
    return _levels[device]


_levels: dict[torch.device, torch.Tensor] = {}


class Int8Linear(QuantizedLinear):
    """Each output row in int8, its largest magnitude being 127."""

    kind = "int8"

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        weight = base.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127  # (out, 1)
        scale[scale == 0] = 1.0
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale.view(torch.uint8))  # (out, 4)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (self.codes * self.scale.view(torch.float32)).to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ, keeping nothing but the layer for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None


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

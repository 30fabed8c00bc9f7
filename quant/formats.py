"""The formats of quantized files: how a layer of any class is written, what config.json says, how it is read again.

gptq, gptq_v2, awq, compressed-tensors (pack-quantized): codes with scales for groups of inputs (layouts.py)
int-quantized (compressed-tensors)
          weight (out, in) int8; weight_scale (out, 1); inputs are rounded to 8 bits, too, or not
bnb_8bit  LLM.int8(): weight (out, in) int8; SCB (out,) float32: largest magnitudes; weight_format () uint8: 0, by rows
bnb_4bit  NF4 and FP4: weight (out * in / 2, 1) uint8; weight.absmax, weight.quant_map, weight.nested_absmax,
          weight.nested_quant_map; weight.quant_state.bitsandbytes__nf4: the rest as the bytes of a JSON object
bitnet    b158: weight (out / 4, in) uint8, weight_scale (1,), as transformers' BitLinear; b1, which it does not have:
          weight (out, in / 32) int32
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from quant.bitnet import PackedBitLinear
from quant.four_bit import BLOCKS, SCALES_BLOCK, FourBitLinear, functional
from quant.grouped import GroupedLinear
from quant.int8 import Int8Linear, W8A8Linear, around_128
from quant.layouts import LAYOUTS, Tensors, check_shape, config_of
from quant.linear import QuantizedLinear
from quant.llm_int8 import THRESHOLD, LLMInt8Linear


class Scheme(NamedTuple):
    """How the layers of a directory are quantized."""

    layout: str
    """name in FORMATS"""
    bits: int = 8
    group_size: int = -1
    """inputs that share a scale; -1: the whole row"""
    symmetric: bool = False
    act_order: bool = True
    damping: float = 0.01
    threshold: float = THRESHOLD
    """magnitude from which an input is an outlier (bnb_8bit)"""
    kind: str = "nf4"
    """variant of the layout: nf4 or fp4 (bnb_4bit), w8a8 or int8 (int-quantized), b158 or b1 (bitnet)"""
    double: bool = True
    """whether the scales are quantized, too (bnb_4bit)"""
    layers: tuple[tuple[str, Scheme], ...] = ()
    """regular expression -> scheme of the layers whose whole name it matches from the start on; the first one counts"""

    def of(self, path: str) -> Scheme:
        """Return the scheme of the layer `path`."""
        return next((own for pattern, own in self.layers if re.match(pattern, path)), self)


class Format(NamedTuple):
    """How one format keeps a layer."""

    write: Callable[[Any, torch.dtype], Tensors]
    """(layer, dtype of the model) -> the layer's tensors, by their names behind the layer's"""
    read: Callable[[Mapping[str, torch.Tensor], nn.Linear, Scheme], QuantizedLinear]
    """(tensors, layer to replace, scheme) -> quantized layer; ValueError for tensors that do not fit"""
    names: frozenset[str]
    """tensors that a layer has; more than these may be there"""
    config: Callable[[Scheme, torch.dtype], dict[str, Any]]
    """(scheme, dtype of the model) -> the `quantization_config` that readers expect in config.json"""


def grouped(name: str) -> Format:
    """Return the format of a layout of codes, scales and zero points."""
    layout = LAYOUTS[name]

    def write(layer: GroupedLinear, dtype: torch.dtype) -> Tensors:
        tensors = layout.write(layer.quantized(), layer.bits)
        wide = torch.promote_types(dtype, torch.float16)  # bfloat16 has too few digits for a scale of many codes
        return {key: t.to(wide) if key == "weight_scale" else t for key, t in tensors.items()}

    def read(tensors: Mapping[str, torch.Tensor], layer: nn.Linear, scheme: Scheme) -> GroupedLinear:
        if name == "compressed-tensors" and not scheme.symmetric and "weight_zero_point" not in tensors:
            raise ValueError("weight_zero_point is missing, and config.json says that zero points are not symmetric")
        layout.check(tensors, layer.out_features, layer.in_features, scheme.bits, scheme.group_size)
        quantized = layout.read(tensors, scheme.bits, scheme.group_size)
        return GroupedLinear(layer, quantized, scheme.bits)

    return Format(write, read, layout.names, lambda scheme, _: config_of(name, scheme))


# ---- compressed-tensors: int-quantized


def write_int(layer: Int8Linear, dtype: torch.dtype) -> Tensors:
    """Return the tensors of a layer with int8 weights."""
    wide = torch.promote_types(dtype, torch.float16)
    return {"weight": layer.codes, "weight_scale": layer.scale.view(torch.float32).to(wide)}


def read_int(tensors: Mapping[str, torch.Tensor], layer: nn.Linear, scheme: Scheme) -> QuantizedLinear:
    """Return the layer that the tensors of an int-quantized file stand for."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    check_shape("weight", weight, (layer.out_features, layer.in_features), torch.int8)
    check_shape("weight_scale", scale, (layer.out_features, 1), float)
    if "weight_zero_point" in tensors and tensors["weight_zero_point"].any():
        raise ValueError("weight_zero_point is not 0: only symmetric weights are read here")
    if scheme.kind == "w8a8":
        return W8A8Linear(layer, (weight, scale))
    return GroupedLinear(layer, around_128(weight, scale.float()), 8)


def int_config(scheme: Scheme, _: torch.dtype) -> dict[str, Any]:
    """Return the `quantization_config` of int-quantized weights whose inputs are rounded token by token."""
    config = config_of("compressed-tensors", scheme._replace(symmetric=True, group_size=-1))
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config["config_groups"]["group_0"]["input_activations"] = inputs
    return config | {"format": "int-quantized"}


# ---- bitsandbytes


def write_8bit(layer: LLMInt8Linear, _: torch.dtype) -> Tensors:
    """Return the tensors of a layer as bitsandbytes' Linear8bitLt has them in its state dict."""
    absmax = layer.absmax.view(torch.float32).flatten()
    return {"weight": layer.codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def read_8bit(tensors: Mapping[str, torch.Tensor], layer: nn.Linear, scheme: Scheme) -> LLMInt8Linear:
    """Return the layer that the tensors of a Linear8bitLt stand for."""
    weight, absmax = tensors["weight"], tensors["SCB"]
    check_shape("weight", weight, (layer.out_features, layer.in_features), torch.int8)
    check_shape("SCB", absmax, (layer.out_features,), torch.float32)
    if "weight_format" in tensors and int(tensors["weight_format"]):
        raise ValueError("the weight lies in a GPU's order of tiles, not by rows: save it with a newer bitsandbytes")
    return LLMInt8Linear(layer, scheme.threshold, weight, absmax)


def write_4bit(layer: FourBitLinear, dtype: torch.dtype) -> Tensors:
    """Return the tensors of a layer as bitsandbytes' Linear4bit has them in its state dict."""
    state = layer.state(torch.Size((layer.out_features, layer.in_features)), dtype)
    return {"weight": layer.packed} | {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}


def read_4bit(tensors: Mapping[str, torch.Tensor], layer: nn.Linear, scheme: Scheme) -> FourBitLinear:
    """Return the layer that the tensors of a Linear4bit stand for."""
    n = layer.out_features * layer.in_features
    check_shape("weight", tensors["weight"], ((n + 1) // 2, 1), torch.uint8)
    parts = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    for name, tensor in parts.items():
        if name.startswith("weight.quant_state."):  # the bytes of a JSON object
            check_shape(name, tensor, (tensor.numel(),), torch.uint8)
    try:
        state = functional().QuantState.from_dict(parts, tensors["weight"].device)
    except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:  # what damaged JSON leads to
        raise ValueError(f"weight.quant_state is damaged: {error!r}") from None
    if state.quant_type not in ("nf4", "fp4") or (state.nested and state.state2.blocksize != SCALES_BLOCK):
        raise ValueError(f"weight.quant_state is of a kind that is not read here: {state.quant_type!r}")
    expected = (layer.out_features, layer.in_features)
    if tuple(state.shape or ()) != expected:
        raise ValueError(f"weight is coded for shape {tuple(state.shape or ())}, where {expected} is expected")
    check_scales(state, n)
    return FourBitLinear(layer, state.quant_type, state.nested, (tensors["weight"], state))


def check_scales(state: Any, n: int) -> None:
    """Raise ValueError for the QuantState of n weights whose scales or levels have another shape or dtype: bitsandbytes
    reads as many as there should be, also behind the end of a tensor."""
    if type(state.blocksize) is not int or state.blocksize not in BLOCKS:
        raise ValueError(f"weight.quant_state: blocksize should be one of {BLOCKS}, found {state.blocksize!r}")
    blocks = -(-n // state.blocksize)
    check_shape("weight.absmax", state.absmax, (blocks,), torch.uint8 if state.nested else torch.float32)
    check_shape("weight.quant_map", state.code, (16,), torch.float32)
    if state.nested:
        check_shape("weight.nested_absmax", state.state2.absmax, (-(-blocks // SCALES_BLOCK),), torch.float32)
        check_shape("weight.nested_quant_map", state.state2.code, (256,), torch.float32)
        if not state.offset.isfinite():
            raise ValueError(f"weight.quant_state: nested_offset should be finite, found {float(state.offset)}")


def bnb_config(scheme: Scheme, dtype: torch.dtype) -> dict[str, Any]:
    """Return the `quantization_config` of bitsandbytes, with transformers' names."""
    four = scheme.layout == "bnb_4bit"
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": not four,
        "load_in_4bit": four,
        "llm_int8_threshold": scheme.threshold,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": scheme.kind,
        "bnb_4bit_use_double_quant": scheme.double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


# ---- BitNet


def write_bitnet(layer: PackedBitLinear, _: torch.dtype) -> Tensors:
    """Return the tensors of a packed layer."""
    return {"weight": layer.packed, "weight_scale": layer.scale.view(torch.float32)}


def read_bitnet(tensors: Mapping[str, torch.Tensor], layer: nn.Linear, scheme: Scheme) -> PackedBitLinear:
    """Return the layer that the tensors of a packed layer stand for."""
    weight, scale, (out, n_inputs) = tensors["weight"], tensors["weight_scale"], (layer.out_features, layer.in_features)
    if scheme.kind == "b158":
        check_shape("weight", weight, (-(-out // 4), n_inputs), torch.uint8)
    else:
        check_shape("weight", weight, (out, -(-n_inputs // 32)), torch.int32)
    check_shape("weight_scale", scale.reshape(-1), (1,), float)
    if not scale.isfinite().all() or float(scale) <= 0:
        raise ValueError(f"weight_scale should be above 0 and finite, found {float(scale)}")
    return PackedBitLinear(layer, scheme.kind, (weight, scale))


def bitnet_config(kind: str, online: bool) -> dict[str, Any]:
    """Return the `quantization_config` of BitNet layers. online: with full weights, which are rounded as they are used.

    b1 has a name of its own, so that a reader of b158 does not take it for that.
    """
    return {
        "quant_method": "bitnet" if kind == "b158" else f"bitnet_{kind}",
        "linear_class": "autobitlinear" if online else "bitlinear",
        "quantization_mode": "online" if online else "offline",
        "use_rms_norm": False,
        "modules_to_not_convert": ["lm_head"],
    }


FORMATS = {name: grouped(name) for name in LAYOUTS} | {
    "int-quantized": Format(write_int, read_int, frozenset({"weight", "weight_scale"}), int_config),
    "bnb_8bit": Format(write_8bit, read_8bit, frozenset({"weight", "SCB"}), bnb_config),
    "bitnet": Format(
        write_bitnet,
        read_bitnet,
        frozenset({"weight", "weight_scale"}),
        lambda scheme, _: bitnet_config(scheme.kind, online=False),
    ),
    "bnb_4bit": Format(write_4bit, read_4bit, frozenset({"weight", "weight.absmax"}), bnb_config),
}

"""What the compiled step (cpu_step.cpp) reads of a linear layer, quantized or not.

Codes are read where they lie. Copies are made only where the compiled code could not read them, once for each layer:
3 bits become 4; BitNet's, which lie across rows, lie along them; scales of NF4 that are quantized themselves become
numbers; a row that ends inside of 32 inputs is filled up.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from decoding.pages import in_huge_pages
from quant.bitnet import PackedBitLinear, unpack_ternary
from quant.four_bit import BLOCK, FourBitLinear, levels_of
from quant.gptq import solve_nearest
from quant.grid import GridOptions
from quant.grouped import GroupedLinear
from quant.int8 import W8A8Linear
from quant.packing import pack, unpack

CHUNK = 32  # inputs that the step unpacks at once; groups are multiples of it
# values of `bits` besides 2, 4 and 8: signed bytes; 4 bits that name one of 16 levels
SIGNED, LEVELS = 9, 5
# how inputs are rounded; the names are those of cpu_grouped.h
BLOCKS_16, TOKEN_8, TOKEN_8_BITNET = 0, 1, 2
# Levels are whole numbers up to this one: eight products with inputs of 16 bits fit in 32 bits. FP4's are exact.
STEPS = 8064


class Weight(ctypes.Structure):
    """`Weight` in cpu_grouped.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales", "zeros", "levels")),
        *((name, ctypes.c_int64) for name in ("bits", "group", "groups", "inputs")),
    )


class Coded(NamedTuple):
    """A quantized weight as the compiled code reads it."""

    codes: torch.Tensor
    """rows of groups * group codes, from the lowest bit on (of levels: the first of a pair in the high half)"""
    scales: torch.Tensor
    """(out, groups) float32"""
    zeros: torch.Tensor | None
    """(out, groups) uint8; None: 0"""
    bits: int
    group: int
    """inputs of a group, a multiple of CHUNK"""
    levels: torch.Tensor | None = None
    """(16,) int16"""
    inputs: int = BLOCKS_16


def is_read(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a module is a quantized layer that the compiled step reads, in a model of `dtype`."""
    if dtype == torch.float64:
        return False
    if type(module) is GroupedLinear:
        return module.group_size(CHUNK) is not None
    if type(module) is FourBitLinear:
        return module.block == BLOCK and module.in_features % BLOCK == 0
    return type(module) in (W8A8Linear, PackedBitLinear)


def weight_of(layer: nn.Module, kept: list[torch.Tensor]) -> Weight:
    """Return what the compiled step reads of a linear layer; tensors that have to live as long are added to `kept`."""
    if isinstance(layer, nn.Linear):
        return Weight(data=layer.weight.data_ptr())
    coded = coded_of(layer)
    kept += [each for each in (coded.codes, coded.scales, coded.zeros, coded.levels) if each is not None]
    zeros, levels = (None if each is None else each.data_ptr() for each in (coded.zeros, coded.levels))
    groups = coded.scales.shape[1]
    return Weight(
        *(coded.codes.data_ptr(), coded.scales.data_ptr(), zeros, levels),
        *(coded.bits, coded.group, groups, coded.inputs),
    )


def coded_of(layer: nn.Module) -> Coded:
    """Return a quantized layer as the compiled code reads it."""
    if layer not in _coded:
        _coded[layer] = MAKERS[type(layer)](layer)
    return _coded[layer]


def of_grouped(layer: GroupedLinear) -> Coded:
    """Return codes in groups: the layer's own in 2, 4 and 8 bits."""
    size = layer.group_size(CHUNK)
    bits, codes = 4 if layer.bits == 3 else layer.bits, layer.packed
    missing = size * layer.zero.shape[1] - layer.in_features
    if bits != layer.bits or missing:
        codes = pack(F.pad(unpack(layer.packed, layer.bits, layer.in_features), (0, missing)), bits)
    return Coded(codes, layer.scale.view(torch.float32), layer.zero, bits, size)


def of_levels(layer: FourBitLinear) -> Coded:
    """Return NF4 or FP4: the layer's own codes, with scales for blocks of 64 inputs as numbers."""
    levels = levels_of(layer.kind)
    scales = layer.scales().view(layer.out_features, -1) / STEPS  # (out, in / 64)
    whole = (levels * STEPS).round().to(torch.int16)
    return Coded(layer.packed, scales.contiguous(), None, LEVELS, BLOCK, whole)


def of_w8a8(layer: W8A8Linear) -> Coded:
    """Return int8 weights whose inputs are rounded token by token: the layer's own codes."""
    missing = -layer.in_features % CHUNK
    codes = F.pad(layer.codes, (0, missing)) if missing else layer.codes
    scales = layer.scale.view(torch.float32)
    return Coded(codes.contiguous(), scales, None, SIGNED, layer.in_features + missing, inputs=TOKEN_8)


def of_bitnet(layer: PackedBitLinear) -> Coded:
    """Return BitNet weights as a copy in 2 bits, whose inputs are rounded token by token."""
    n = layer.in_features
    if layer.kind == "b158":
        codes = unpack_ternary(layer.packed, layer.out_features) + 1  # 0, 1, 2
    else:
        codes = 2 * unpack(layer.packed, 1, n)  # 0, 2
    missing = -n % CHUNK
    scales = (1 / layer.scale.view(torch.float32)).expand(layer.out_features, 1).contiguous()
    zeros = torch.ones(layer.out_features, 1, dtype=torch.uint8)
    packed = pack(F.pad(codes, (0, missing)), 2)
    return Coded(packed, scales, zeros, 2, n + missing, inputs=TOKEN_8_BITNET)


MAKERS = {GroupedLinear: of_grouped, FourBitLinear: of_levels, W8A8Linear: of_w8a8, PackedBitLinear: of_bitnet}
_coded: weakref.WeakKeyDictionary[nn.Module, Coded] = weakref.WeakKeyDictionary()


def in_8_bits(head: nn.Linear) -> GroupedLinear:
    """Return a copy of the head rounded to 8 bits: it is a model's largest matrix once the others are quantized. It is
    made once for each head, as long as its weight stays."""
    weight = head.weight
    state = (weight.data_ptr(), weight._version)
    if head not in _heads or _heads[head][0] != state:
        grid = GridOptions(8, 64, search=False)
        rounded = GroupedLinear(head, solve_nearest(weight.detach().float(), grid), 8)
        in_huge_pages(rounded)
        _heads[head] = state, rounded
    return _heads[head][1]


_heads: weakref.WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], GroupedLinear]] = weakref.WeakKeyDictionary()

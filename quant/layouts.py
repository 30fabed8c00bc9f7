"""Names, shapes and dtypes of quantized tensors on disk: one entry a format, from a layer's codes to a file and back.

gptq      qweight (in * b / 32, out), qzeros (groups, out * b / 32), g_idx (in,), all int32; scales (groups, out);
          a stored zero point is one less than the true one (AutoGPTQ's version 1)
gptq_v2   the same with true zero points
awq       qweight (in, out / 8), qzeros (groups, out / 8), int32 in AWQ's order of columns; scales (groups, out)
compressed-tensors (pack-quantized)
          weight_packed (out, in * b / 32), weight_zero_point (out * b / 32, groups), int32; weight_scale (out, groups);
          weight_shape (2,)

Scales are float16 in the first three, and keep their dtype in the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from quant.grid import Quantized, group_index
from quant.packing import pack, pack_awq, unpack, unpack_awq

Tensors = dict[str, torch.Tensor]
Shape = tuple[tuple[int, ...], torch.dtype | type]  # and dtype: one, or int or float for any whole or floating one
INDICES = frozenset({"g_idx", "weight_g_idx"})  # tensors with the group of each input
NO_ORDER = -1  # everywhere in a weight_g_idx: groups of neighbours (compressed-tensors' first value of it)


class Layout(NamedTuple):
    """How one format keeps a layer."""

    write: Callable[[Quantized, int], Tensors]
    """(quantized, bits) -> the layer's tensors by their last name"""
    read: Callable[[Mapping[str, torch.Tensor], int, int], Quantized]
    """(tensors, bits, group_size) -> quantized"""
    shapes: Callable[[int, int, int, int], dict[str, Shape]]
    """(outputs, inputs, bits, groups) -> shape and dtype of the tensors of a layer"""
    optional: frozenset[str] = frozenset()
    """tensors of `shapes` that may be missing"""

    @property
    def names(self) -> frozenset[str]:
        """Last names of the tensors that a layer has; more than these may be there."""
        return frozenset(self.shapes(32, 32, 4, 1)) - self.optional

    def check(self, tensors: Mapping[str, torch.Tensor], out: int, n_inputs: int, bits: int, group_size: int) -> None:
        """Raise ValueError for tensors of a layer (out, n_inputs) that have another shape or dtype, or groups of inputs
        that are not there."""
        groups = -(-n_inputs // group_size) if group_size > 0 else 1
        for name, (shape, dtype) in self.shapes(out, n_inputs, bits, groups).items():
            if name in tensors:
                check_shape(name, tensors[name], shape, dtype)
        if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [out, n_inputs]:
            raise ValueError(f"weight_shape is {tensors['weight_shape'].tolist()}, expected {[out, n_inputs]}")
        for name in INDICES & tensors.keys():
            if name == "weight_g_idx" and bool((tensors[name] == NO_ORDER).all()):
                continue
            low, high = int(tensors[name].min()), int(tensors[name].max())
            if low < 0 or high >= groups:
                raise ValueError(
                    f"{name} has the groups {low} to {high}, where config.json makes them 0 to {groups - 1}"
                )


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | type) -> None:
    """Raise ValueError for a tensor of another shape or dtype; int, float: any whole or floating-point dtype."""
    kind = float if tensor.is_floating_point() else int
    if tuple(tensor.shape) != shape or dtype not in (tensor.dtype, kind) or tensor.dtype == torch.bool:
        found, expected = (str(each).removeprefix("torch.") for each in (tensor.dtype, dtype))
        expected = {int: "whole numbers", float: "floating point"}.get(dtype, expected)
        raise ValueError(f"{name} is {found} of shape {tuple(tensor.shape)}, expected {expected} of {shape}")


def write_gptq(quantized: Quantized, bits: int, stored_less: int = 1) -> Tensors:
    """Return the tensors of a GPTQ file. Raises ValueError for a zero point or a shape that the format cannot keep."""
    for side, n in (("outputs", quantized.codes.shape[0]), ("inputs", quantized.codes.shape[1])):
        if n % 32:  # readers allocate n // 32 * bits words, and drop the rest
            raise ValueError(
                f"format gptq keeps layers whose {side} are a multiple of 32, found {n}: pad them with zeros"
            )
    zeros = quantized.zeros.to(torch.int64).T - stored_less  # (groups, out)
    if zeros.numel() and int(zeros.min()) < 0:
        # Readers disagree on a stored -1: some take it for 2^b, others for 0.
        raise ValueError("format gptq cannot keep a zero point of 0: quantize with least_zero 1, or write gptq_v2")
    return {
        "qweight": pack(quantized.codes, bits).T.contiguous(),  # packed along the inputs
        "qzeros": pack(zeros, bits),  # packed along the outputs
        "scales": quantized.scales.T.to(torch.float16).contiguous(),
        "g_idx": quantized.groups.to(torch.int32),
    }


def read_gptq(tensors: Mapping[str, torch.Tensor], bits: int, group_size: int, stored_less: int = 1) -> Quantized:
    """Return what the tensors of a GPTQ file stand for."""
    codes = unpack(tensors["qweight"].T.contiguous(), bits)  # (out, in)
    zeros = unpack(tensors["qzeros"], bits).to(torch.int64).T + stored_less  # (out, groups)
    # The addition is made field by field, within the width of a code: 2^b wraps to 0, as in AutoGPTQ's own reader.
    zeros = zeros % 2**bits
    groups = tensors["g_idx"].long() if "g_idx" in tensors else group_index(codes.shape[1], group_size)
    return Quantized(codes, tensors["scales"].T.float().contiguous(), zeros.to(torch.uint8).contiguous(), groups)


def write_gptq_v2(quantized: Quantized, bits: int) -> Tensors:
    """Return the tensors of a GPTQ file of version 2."""
    return write_gptq(quantized, bits, stored_less=0)


def read_gptq_v2(tensors: Mapping[str, torch.Tensor], bits: int, group_size: int) -> Quantized:
    """Return what the tensors of a GPTQ file of version 2 stand for."""
    return read_gptq(tensors, bits, group_size, stored_less=0)


def write_awq(quantized: Quantized, bits: int) -> Tensors:
    """Return the tensors of an AWQ file ("gemm"): 4 bits, groups of neighbours."""
    check_neighbours(quantized, "awq")
    if bits != 4:
        raise ValueError(f"format awq keeps 4 bits, found {bits}")
    return {
        "qweight": pack_awq(quantized.codes.T.contiguous()),  # (in, out / 8)
        "qzeros": pack_awq(quantized.zeros.T.contiguous()),  # (groups, out / 8)
        "scales": quantized.scales.T.to(torch.float16).contiguous(),
    }


def read_awq(tensors: Mapping[str, torch.Tensor], bits: int, group_size: int) -> Quantized:
    """Return what the tensors of an AWQ file stand for."""
    codes = unpack_awq(tensors["qweight"]).T.contiguous()  # (out, in)
    zeros = unpack_awq(tensors["qzeros"]).T.contiguous()  # (out, groups)
    groups = group_index(codes.shape[1], group_size)
    return Quantized(codes, tensors["scales"].T.float().contiguous(), zeros, groups)


def write_compressed(quantized: Quantized, bits: int) -> Tensors:
    """Return the tensors of a compressed-tensors file of the kind pack-quantized."""
    check_neighbours(quantized, "compressed-tensors")
    out, n_inputs = quantized.codes.shape
    return {
        "weight_packed": pack(quantized.codes, bits),
        "weight_scale": quantized.scales.contiguous(),
        "weight_zero_point": pack(quantized.zeros.T, bits).T.contiguous(),
        "weight_shape": torch.tensor([out, n_inputs]),
    }


def read_compressed(tensors: Mapping[str, torch.Tensor], bits: int, group_size: int) -> Quantized:
    """Return what the tensors of a compressed-tensors file stand for; without zero points it is symmetric."""
    out, n_inputs = tensors["weight_shape"].tolist()
    codes = unpack(tensors["weight_packed"], bits, n_inputs)
    scales = tensors["weight_scale"].float().contiguous()
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        zeros = unpack(tensors["weight_zero_point"].T, bits, out).T.contiguous()
    groups = group_index(n_inputs, group_size)
    if "weight_g_idx" in tensors and (tensors["weight_g_idx"] != NO_ORDER).any():
        groups = tensors["weight_g_idx"].long()  # groups that were made in the order of activation
    return Quantized(codes, scales, zeros, groups)


def check_neighbours(quantized: Quantized, name: str) -> None:
    """Raise ValueError unless every group is a run of neighbouring inputs, the only order that the format has."""
    if (quantized.groups.diff() < 0).any():
        raise ValueError(f"format {name} keeps groups of neighbouring inputs only")


def shapes_of_gptq(out: int, n_inputs: int, bits: int, groups: int) -> dict[str, Shape]:
    """Return what the tensors of a GPTQ file are."""
    return {
        "qweight": ((n_inputs * bits // 32, out), torch.int32),
        "qzeros": ((groups, out * bits // 32), torch.int32),
        "scales": ((groups, out), float),
        "g_idx": ((n_inputs,), int),
    }


def shapes_of_awq(out: int, n_inputs: int, bits: int, groups: int) -> dict[str, Shape]:
    """Return what the tensors of an AWQ file are."""
    return {
        "qweight": ((n_inputs, out // 8), torch.int32),
        "qzeros": ((groups, out // 8), torch.int32),
        "scales": ((groups, out), float),
    }


def shapes_of_compressed(out: int, n_inputs: int, bits: int, groups: int) -> dict[str, Shape]:
    """Return what the tensors of a compressed-tensors file are."""
    return {
        "weight_packed": ((out, -(-n_inputs * bits // 32)), torch.int32),
        "weight_scale": ((out, groups), float),
        "weight_zero_point": ((-(-out * bits // 32), groups), torch.int32),
        "weight_shape": ((2,), int),
        "weight_g_idx": ((n_inputs,), int),
    }


NOT_ALWAYS = frozenset({"weight_zero_point", "weight_g_idx"})
LAYOUTS: dict[str, Layout] = {
    "gptq": Layout(write_gptq, read_gptq, shapes_of_gptq, frozenset({"g_idx"})),
    "gptq_v2": Layout(write_gptq_v2, read_gptq_v2, shapes_of_gptq, frozenset({"g_idx"})),
    "awq": Layout(write_awq, read_awq, shapes_of_awq),
    "compressed-tensors": Layout(write_compressed, read_compressed, shapes_of_compressed, NOT_ALWAYS),
}


def config_of(name: str, scheme: Any) -> dict[str, Any]:
    """Return the `quantization_config` that a config.json of this format has, as its readers expect it; scheme: a
    formats.Scheme."""
    bits, group_size, symmetric = scheme.bits, scheme.group_size, scheme.symmetric
    if name in ("gptq", "gptq_v2"):
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": symmetric,
            "desc_act": False,  # codes lie in the order of the inputs, whatever order they were rounded in
            "static_groups": scheme.act_order,
            "damp_percent": scheme.damping,
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": name,
        }
        # gptqmodel's settings of single layers, of which auto-gptq knows nothing
        dynamic = {f"+:{pattern}": {"bits": own.bits} for pattern, own in scheme.layers}
        return config | ({"dynamic": dynamic} if dynamic else {})
    if name == "awq":
        return {
            "quant_method": "awq",
            "bits": bits,
            "group_size": group_size,
            "zero_point": not symmetric,
            "version": "gemm",
            "modules_to_not_convert": None,
        }
    groups: dict[int, list[str]] = {} if scheme.layers else {bits: ["Linear"]}  # width -> layers
    for pattern, own in scheme.layers:
        groups.setdefault(own.bits, []).append(f"re:{pattern}")
    weights = {
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    rest = {"input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": targets, "weights": {"num_bits": width} | weights} | rest
            for number, (width, targets) in enumerate(groups.items())
        },
        "ignore": ["lm_head"],
    }

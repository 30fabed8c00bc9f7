"""What is known of the quantizers and of the methods of quantize.py without torch, for the argument parser."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A quantizer."""

    double_quant: bool = False
    """whether it can quantize its scales, too"""
    package: str | None = None
    """an optional package that it needs (setup.sh --extra bnb); None: nothing"""


KINDS = {  # keys: those of replace.QUANTIZERS
    "nf4": Kind(double_quant=True, package="bitsandbytes"),
    "fp4": Kind(double_quant=True, package="bitsandbytes"),
    "int8": Kind(),
}


class Method(NamedTuple):
    """A method of quantize.py."""

    bits: tuple[int, ...]
    """widths of a code, the default first"""
    formats: tuple[str, ...]
    """what its files can be, the default first"""
    flags: frozenset[str] = frozenset()
    """flags of OPTIONS that it takes"""
    text: bool = False
    """whether it needs calibration text"""


WIDTHS, PACKED = (4, 2, 3, 8), ("gptq", "gptq_v2", "awq", "compressed-tensors")
GRID = frozenset({"group_size", "symmetric", "search", "override"})
BITNETS = ("b158", "b1")  # kinds of layers that are trained in few bits
OPTIONS = GRID | {"propagation", "damping", "act_order", "double_quant", "threshold", "alpha"}  # of some methods only
METHODS = {
    "gptq": Method(WIDTHS, PACKED, GRID | {"propagation", "damping", "act_order"}, text=True),
    "awq": Method(WIDTHS, PACKED, GRID - {"search"}, text=True),
    "rtn": Method(WIDTHS, PACKED, GRID),
    "int8": Method((8,), ("gptq", "gptq_v2", "compressed-tensors")),
    "smoothquant": Method((8,), ("compressed-tensors",), frozenset({"alpha"}), text=True),
    "llm_int8": Method((8,), ("bnb",), frozenset({"threshold"})),
    "qat": Method(WIDTHS, PACKED),
    "bitnet": Method((2,), ("bitnet",)),
    "nf4": Method((4,), ("bnb",), frozenset({"double_quant"})),
    "fp4": Method((4,), ("bnb",), frozenset({"double_quant"})),
}
FORMATS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.formats))

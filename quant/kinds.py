"""What is known of the quantizers without torch, for the argument parser."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A quantizer."""

    double_quant: bool = False
    """whether it can quantize its scales, too"""
    package: str | None = None
    """what pip has to install for it, as name>=version; None: nothing"""


KINDS = {  # keys: those of replace.QUANTIZERS
    "nf4": Kind(double_quant=True, package="bitsandbytes>=0.50"),
    "fp4": Kind(double_quant=True, package="bitsandbytes>=0.50"),
    "int8": Kind(),
}

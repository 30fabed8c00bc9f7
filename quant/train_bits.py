"""Make the linear layers of a model such as are trained with rounded weights: BitNet's, or those of QAT."""

from __future__ import annotations

from torch import nn

from quant.bitnet import BitLinear
from quant.kinds import BITNETS
from quant.qat import QATLinear, grid_of
from quant.replace import base_layers, replace


def train_in_bits(model: nn.Module, kind: str) -> None:
    """Make every linear layer of a model but the head one of `kind`, which trains the parameters that it has.

    kind: b158 or b1 (BitNet), or a grid such as int4g128 (QAT).
    """
    if kind not in BITNETS:
        grid_of(kind)
    cls = BitLinear if kind in BITNETS else QATLinear
    for path, layer in base_layers(model):
        replace(model, path, cls(layer, kind))

"""DoRA (Liu et al. 2024, arXiv:2402.09353): the weight's rows have a trained length and a LoRA-trained direction.

W' = m * V / ||V||, V = W + scaling B A, the norm over each output row. The gradient does not pass through ||V||
(section 4.3 of the paper), and dropout acts on the low-rank path alone.
"""

from __future__ import annotations

import torch
from torch import nn

from lora.low_rank import LowRank
from lora.spec import LoraSpec
from quant.replace import dense_weight


class Dora(LowRank):
    """LoRA and `lora_magnitude_vector` (out,), which starts as the norms of W's rows: training starts at W."""

    def __init__(self, base: nn.Module, spec: LoraSpec) -> None:
        super().__init__(base, spec)
        self.lora_magnitude_vector = nn.Parameter(self._norm(dense_weight(base)))

    @torch.no_grad()
    def _norm(self, weight: torch.Tensor) -> torch.Tensor:
        """The norms of the rows of V (out,); a constant for autograd."""
        return torch.linalg.norm(super().merged(weight), dim=1)

    def forward(self, base: nn.Module, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The adapted output, from the layer, its input and its own output."""
        # How far lengths are from those of V is small, 0 at first: a scale near 1 in bfloat16 would hardly show it.
        change = (self.lora_magnitude_vector / self._norm(dense_weight(base)) - 1).to(out.dtype)
        sum_ = out + self.update(x)
        return torch.addcmul(sum_, sum_ if base.bias is None else sum_ - base.bias.to(out.dtype), change)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The one weight that does the same, from the base's (out, in); float32 or wider."""
        return (self.lora_magnitude_vector / self._norm(weight))[:, None] * super().merged(weight)

"""DoRA (Liu et al. 2024, arXiv:2402.09353): the length of each row of the weight is trained, its direction by LoRA.

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
    """LoRA with `lora_magnitude_vector` m (out,), initialized with the norms of W's rows: training starts at W."""

    takes_embeddings = False

    def __init__(self, base: nn.Module, spec: LoraSpec) -> None:
        super().__init__(base, spec)
        self.lora_magnitude_vector = nn.Parameter(self._norm(dense_weight(base)))

    @torch.no_grad()
    def _norm(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the norms of the rows of V (out,), a constant for autograd; weight: W (out, in)."""
        return torch.linalg.norm(super().merged(weight), dim=1)

    def forward(self, base: nn.Module, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return the adapted output (..., out) for the layer `base`, its input x (..., in) and its own output."""
        # m / ||V|| - 1, (out,): close to 0, which bfloat16 represents well; it would round m / ||V|| itself to 1
        change = (self.lora_magnitude_vector / self._norm(dense_weight(base)) - 1).to(out.dtype)
        sum_ = out + self.update(x)  # V x + bias
        # the bias is not scaled: V x + bias + change * V x
        return torch.addcmul(sum_, sum_ if base.bias is None else sum_ - base.bias.to(out.dtype), change)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W' (out, in) from W (out, in); float32 or wider."""
        return (self.lora_magnitude_vector / self._norm(weight))[:, None] * super().merged(weight)

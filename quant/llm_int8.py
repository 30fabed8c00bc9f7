"""LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): products of whole numbers, except for columns of outliers.

Weights have 8 bits and one scale for each output row, inputs 8 bits and one scale for each token. Columns in which an
input of any token reaches the threshold are multiplied in full precision. The arithmetic is that of bitsandbytes, bit
for bit: inputs and weights are rounded to float16 before they are rounded to 8 bits.
"""

from __future__ import annotations

import torch
from torch import nn

from quant.int8 import whole_product
from quant.linear import QuantizedLinear

THRESHOLD = 6.0


class LLMInt8Linear(QuantizedLinear):
    """Weights and inputs in 8 bits. codes (out, in) int8; absmax (out, 4) uint8: the largest magnitude of each row, as
    the bytes of a float32."""

    kind = "llm_int8"

    def __init__(
        self,
        base: nn.Linear,
        threshold: float = THRESHOLD,
        codes: torch.Tensor | None = None,
        absmax: torch.Tensor | None = None,
    ) -> None:
        """Take codes (out, in) and absmax (out,), or quantize the weight of `base`; threshold 0: no outliers."""
        super().__init__(base)
        self.threshold = threshold
        if codes is None:
            codes, absmax, _ = round_tokens(base.weight.detach(), 0.0)
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("absmax", absmax.float().reshape(-1, 1).contiguous().view(torch.uint8))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (out, in)."""
        return (self.codes * self.absmax.view(torch.float32) * (1 / 127)).to(dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ (..., out) for x (..., in). All tokens of x share their outlier columns."""
        rows = x.reshape(-1, self.in_features)  # (n, in)
        codes, absmax, columns = round_tokens(rows, self.threshold)
        scale = absmax[:, None] * self.absmax.view(torch.float32).T  # (n, out)
        out = (whole_product(codes, self.codes) * scale * 6.200124e-05).to(x.dtype)  # 1 / 127^2
        if len(columns):
            out = out.addmm(rows[:, columns], self.dequantize(x.dtype)[:, columns].T)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"


def round_tokens(rows: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the 8-bit codes (n, in) int8 of rows (n, in), the largest magnitude (n,) float32 of each row below the
    threshold, and the columns (k,) that hold an outlier, whose codes are 0."""
    half = rows.to(torch.float16)
    columns = torch.empty(0, dtype=torch.long, device=rows.device)
    if threshold > 0:
        outliers = half.abs() >= threshold
        columns = outliers.any(0).nonzero().flatten()
        half = half.masked_fill(outliers, 0)
    absmax = half.abs().amax(1).float()
    codes = torch.round(half * (127.0 / absmax.where(absmax > 0, 1.0))[:, None])
    codes[:, columns] = 0
    return codes.to(torch.int8), absmax, columns

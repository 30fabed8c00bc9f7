"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + scaling * B A dropout(x), W frozen.

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) is the same with scaling = alpha / sqrt(r). Each class here is the
adapter of one layer; parameters carry PEFT's names and are float32 or wider, computing in the dtype of the layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from lora.spec import LoraSpec
from quant.replace import dense_weight


class LowRank(nn.Module):
    """The update of a linear layer: lora_A (r, in) random, lora_B (out, r) zero, so that training starts at W."""

    def __init__(self, base: nn.Module, spec: LoraSpec) -> None:
        super().__init__()
        weight = dense_weight(base)  # (out, in)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.scaling = spec.scaling
        self.dropout = nn.Dropout(spec.dropout)
        self.lora_A = nn.Parameter(torch.empty(spec.r, weight.shape[1], dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], spec.r, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @staticmethod
    def key(parameter: str) -> str:
        """The name of a parameter in a PEFT file, after that of the layer."""
        return parameter if parameter == "lora_magnitude_vector" else f"{parameter}.weight"

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output (..., out) for its input (..., in)."""
        low = self.scaling * F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r)
        return F.linear(low, self.lora_B.to(x.dtype))

    def delta(self) -> torch.Tensor:
        """The change of the weight, (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, base: nn.Module, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The adapted output, from the layer, its input and its own output."""
        return out + self.update(x)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The one weight that does the same, from the base's (out, in); float32 or wider."""
        return weight.to(self.lora_A.dtype) + self.delta()


class EmbeddingLowRank(nn.Module):
    """The update of an embedding: lora_embedding_A (r, V) zero, lora_embedding_B (d, r) random; no dropout, as PEFT."""

    def __init__(self, base: nn.Embedding, spec: LoraSpec) -> None:
        super().__init__()
        rows, width = base.weight.shape
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.scaling = spec.scaling
        self.lora_embedding_A = nn.Parameter(torch.zeros(spec.r, rows, dtype=dtype, device=base.weight.device))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, spec.r, dtype=dtype, device=base.weight.device))

    @staticmethod
    def key(parameter: str) -> str:
        """The name of a parameter in a PEFT file, after that of the layer."""
        return parameter

    def forward(self, base: nn.Embedding, tokens: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The adapted embeddings (..., d), from the layer, the ids (...) and the layer's own output."""
        low = F.embedding(tokens, self.lora_embedding_A.T, base.padding_idx).to(out.dtype)  # (..., r)
        return out + self.scaling * F.linear(low, self.lora_embedding_B.to(out.dtype))

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The one table (V, d) that does the same; float32 or wider."""
        return weight.to(self.lora_embedding_A.dtype) + self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T

"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + scaling * B A dropout(x), W frozen.

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) is the same with scaling = alpha / sqrt(r). Each class here is the
adapter of one layer. Parameters have PEFT's names and are float32 or wider; products use the dtype of the layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from lora.spec import LoraSpec
from quant.replace import dense_weight


class LowRank(nn.Module):
    """Adapter of a linear layer: lora_A (r, in) random, lora_B (out, r) zero, so that training starts at W."""

    changes_base = False
    """whether the construction changes the weight of the layer; then `original` computes the output of before"""
    takes_embeddings = True
    """whether the method has a form for embeddings, `EmbeddingLowRank`"""

    def __init__(self, base: nn.Module, spec: LoraSpec) -> None:
        super().__init__()
        weight = dense_weight(base)  # (out, in)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.scaling = spec.scaling  # alpha / r, or alpha / sqrt(r)
        self.dropout = nn.Dropout(spec.dropout)
        self.lora_A = nn.Parameter(torch.empty(spec.r, weight.shape[1], dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], spec.r, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT does

    @staticmethod
    def key(parameter: str) -> str:
        """Return the name of a parameter in a PEFT file, after the name of the layer."""
        return parameter if parameter == "lora_magnitude_vector" else f"{parameter}.weight"

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return the change of the layer's output (..., out) for its input x (..., in)."""
        low = self.scaling * F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r)
        return F.linear(low, self.lora_B.to(x.dtype))  # (..., out)

    def delta(self) -> torch.Tensor:
        """Return the change of the weight, (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, base: nn.Module, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return the adapted output (..., out) for the layer `base`, its input x (..., in) and its own output."""
        return out + self.update(x)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted weight (out, in) from the base's; float32 or wider."""
        return weight.to(self.lora_A.dtype) + self.delta()


class EmbeddingLowRank(nn.Module):
    """Adapter of an embedding: lora_embedding_A (r, V) zero, lora_embedding_B (d, r) random; no dropout, as in PEFT."""

    changes_base = False

    def __init__(self, base: nn.Embedding, spec: LoraSpec) -> None:
        super().__init__()
        rows, width = base.weight.shape  # V, d
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.scaling = spec.scaling
        self.lora_embedding_A = nn.Parameter(torch.zeros(spec.r, rows, dtype=dtype, device=base.weight.device))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, spec.r, dtype=dtype, device=base.weight.device))

    @staticmethod
    def key(parameter: str) -> str:
        """Return the name of a parameter in a PEFT file, after the name of the layer."""
        return parameter

    def forward(self, base: nn.Embedding, tokens: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return the adapted embeddings (..., d) for the layer `base`, ids (...) and the layer's own output."""
        # only the rows of the ids are read: (V, r) gathered by (...)
        low = F.embedding(tokens, self.lora_embedding_A.T, base.padding_idx).to(out.dtype)  # (..., r)
        return out + self.scaling * F.linear(low, self.lora_embedding_B.to(out.dtype))

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted table (V, d) from the base's; float32 or wider."""
        return weight.to(self.lora_embedding_A.dtype) + self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T

"""PiSSA (Meng et al. 2024, arXiv:2404.02948): the adapter starts as the r largest singular directions of W.

The base keeps what is left, W - scaling B0 A0, frozen. B0 A0 is remembered, so that the adapter can be written as what
it is relative to the *original* W, a plain LoRA of rank 2r: scaling (B A - B0 A0) = scaling [B, -B0] [A; A0]. Any
program can load that one on the original model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lora.low_rank import LowRank
from lora.spec import LoraSpec


class Pissa(LowRank):
    """A LoRA whose construction moves the principal directions of the base weight into itself."""

    def __init__(self, base: nn.Module, spec: LoraSpec) -> None:
        super().__init__(base, spec)
        r, weight = spec.r, base.weight.detach().to(self.lora_A.dtype)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)  # (out, k), (k,), (k, in)
        root = (s[:r] / self.scaling).sqrt()
        with torch.no_grad():
            self.lora_A.copy_(root[:, None] * vh[:r])
            self.lora_B.copy_(u[:, :r] * root)
            base.weight.copy_(weight - self.delta())
        self.register_buffer("initial_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("initial_B", self.lora_B.detach().clone(), persistent=False)

    def original(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The output of the layer as it was before, from its input and its own output."""
        return out + self.scaling * F.linear(F.linear(x, self.initial_A.to(x.dtype)), self.initial_B.to(x.dtype))

    def as_lora(self) -> dict[str, torch.Tensor]:
        """lora_A (2r, in) and lora_B (out, 2r) of the same update, relative to the original weight."""
        return {
            "lora_A": torch.cat([self.lora_A.detach(), self.initial_A]),
            "lora_B": torch.cat([self.lora_B.detach(), -self.initial_B], dim=1),
        }

    @torch.no_grad()
    def restore(self, base: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
        """Undo `as_lora`. Where the singular vectors were found otherwise (another machine), the base follows."""
        r = self.lora_A.shape[0]
        initial_A, initial_B = lora_A[r:].to(self.initial_A), -lora_B[:, r:].to(self.initial_B)
        if not (torch.equal(initial_A, self.initial_A) and torch.equal(initial_B, self.initial_B)):
            base.weight.add_(self.scaling * (self.initial_B @ self.initial_A - initial_B @ initial_A))
            self.initial_A.copy_(initial_A)
            self.initial_B.copy_(initial_B)
        self.lora_A.copy_(lora_A[:r])
        self.lora_B.copy_(lora_B[:, :r])

"""PiSSA (Meng et al. 2024, arXiv:2404.02948): the adapter is initialized with the r largest singular directions of W.

The base keeps the rest, W - scaling B0 A0, frozen. A0 and B0 are kept, so that the adapter can be written relative to
the *original* W, as a plain LoRA of rank 2r: scaling (B A - B0 A0) = scaling [B, -B0] [A; A0]. Any program can load it
on the original model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lora.low_rank import LowRank
from lora.spec import LoraSpec


class Pissa(LowRank):
    """A LoRA whose construction moves the principal directions of the base weight into its factors."""

    changes_base = True
    takes_embeddings = False

    def __init__(self, base: nn.Module, spec: LoraSpec) -> None:
        super().__init__(base, spec)
        r, weight = spec.r, base.weight.detach().to(self.lora_A.dtype)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)  # (out, k), (k,), (k, in)
        # B0 A0 = U_r S_r V_r / scaling: the root of each singular value goes to either side
        root = (s[:r] / self.scaling).sqrt()
        with torch.no_grad():
            self.lora_A.copy_(root[:, None] * vh[:r])
            self.lora_B.copy_(u[:, :r] * root)
            base.weight.copy_(weight - self.delta())
        # A0 and B0, which `as_lora` and `original` subtract; not in state_dict, because as_lora writes them
        self.register_buffer("initial_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("initial_B", self.lora_B.detach().clone(), persistent=False)

    def original(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return the output (..., out) of the original layer, from its input x (..., in) and its own output."""
        # W x = (W - scaling B0 A0) x + scaling B0 A0 x
        return out + self.scaling * F.linear(F.linear(x, self.initial_A.to(x.dtype)), self.initial_B.to(x.dtype))

    def as_lora(self) -> dict[str, torch.Tensor]:
        """Return lora_A (2r, in) and lora_B (out, 2r) of the same update, relative to the original weight."""
        return {
            "lora_A": torch.cat([self.lora_A.detach(), self.initial_A]),
            "lora_B": torch.cat([self.lora_B.detach(), -self.initial_B], dim=1),
        }

    @torch.no_grad()
    def restore(self, base: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
        """Load what `as_lora` returned: lora_A (2r, in), lora_B (out, 2r).

        Singular vectors may differ between machines; then A0 and B0 become those of the file, and the base is adjusted.
        """
        r = self.lora_A.shape[0]
        initial_A, initial_B = lora_A[r:].to(self.initial_A), -lora_B[:, r:].to(self.initial_B)
        if not (torch.equal(initial_A, self.initial_A) and torch.equal(initial_B, self.initial_B)):
            # the sum W of base and scaling B0 A0 stays the same
            base.weight.add_(self.scaling * (self.initial_B @ self.initial_A - initial_B @ initial_A))
            self.initial_A.copy_(initial_A)
            self.initial_B.copy_(initial_B)
        self.lora_A.copy_(lora_A[:r])
        self.lora_B.copy_(lora_B[:, :r])

"""Scaled dot-product attention: one call, several back-ends that agree to rounding.

`q` is (B, H, T, D); `k` and `v` are (B, K, S, D) with K dividing H: query head h reads key head h // (H/K)
(grouped-query attention, Ainslie et al. 2023). A mask is boolean, True where a query may look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Mask:
    """Which keys each of T queries may see: those at or before its own place, and of these only the ones of its own
    document (`doc_ids` (B, T)) and less than `window` positions back. Or `dense` (B or 1, 1, T, S) bool as it is.

    It says what is wanted; a back-end makes of it what its kernel takes, once a forward pass.
    """

    doc_ids: torch.Tensor | None = None
    window: int | None = None
    dense: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Nothing is hidden but what comes later."""
        return self.doc_ids is None and self.window is None and self.dense is None

    def boolean(self, T: int, device: torch.device) -> torch.Tensor | None:
        """The mask written out, (B or 1, 1, T, S) bool; None for the plain causal triangle."""
        if self.dense is None and not self.plain:
            self.dense = causal_mask(self.doc_ids, self.window, T, device)  # kept: all layers ask for the same
        return self.dense


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Attention output (B, H, T, D). A plain mask (or None) means causal when T == S, and everything visible when
    T == 1; any other shape without a mask is ambiguous and refused.
    """
    T, S = q.shape[2], k.shape[2]
    dense = None if mask is None else mask.boolean(T, q.device)
    if dense is None and T not in (1, S):
        # `is_causal` with T < S lines the mask up with the first key, not the last: a decode step would see one key
        raise ValueError(f"attention of {T} queries over {S} keys needs an explicit mask")
    if backend == "auto":
        backend = "reference" if fast_reference(q, S) else "sdpa"
    return BACKENDS[backend](q, k, v, dense, causal=dense is None and T == S and T > 1)


def fast_reference(q: torch.Tensor, S: int) -> bool:
    """Whether plain matmuls beat the fused kernel: on CPU in bfloat16 they do while a head's scores fit in cache."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < S <= 512


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """The formula as it is written: softmax(q kᵀ / √D) v, softmax in float32."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()[None, None]
    q = q.reshape(B, K, H // K * T, D)  # the H/K query heads of one key head side by side
    scores = (q * (1 / math.sqrt(D))) @ k.transpose(-2, -1)  # (B, K, H/K * T, S)
    scores = scores.view(B, K, H // K, T, S).to(torch.promote_types(q.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -math.inf)
    weights = scores.softmax(dim=-1).to(v.dtype).view(B, K, H // K * T, S)
    return (weights @ v).view(B, H, T, D)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """PyTorch's fused kernels (FlashAttention where there is one)."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


BACKENDS = {"reference": reference, "sdpa": sdpa}


def causal_mask(doc_ids: torch.Tensor | None, window: int | None, T: int, device: torch.device) -> torch.Tensor | None:
    """Which of T keys each of T queries may see: (B or 1, 1, T, T) bool, or None for the plain causal triangle.

    Keys of another document (`doc_ids` (B, T)) are hidden, and those `window` or more positions back.
    """
    if doc_ids is None and window is None:
        return None
    i = torch.arange(T, device=device)
    mask = (i[:, None] >= i[None, :])[None, None]  # (1, 1, T, T)
    if window is not None:
        mask = mask & (i[:, None] - i[None, :] < window)
    if doc_ids is not None:
        mask = mask & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])
    return mask

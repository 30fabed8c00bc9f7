"""The two back-ends that take a mask written out: the formula itself, and PyTorch's fused kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from attention.mask import Mask


def layout(mask: Mask, T: int, S: int, device: torch.device) -> torch.Tensor | None:
    """(B or 1, 1, T, S) bool; None where only what comes later is hidden, which the kernels know by themselves (on a
    CPU, of as many queries as keys or a single one)."""
    known = mask.plain(S) and (T in (1, S) or device.type == "cuda")
    return None if known else mask.boolean(T, S, device)


def fast_reference(dtype: torch.dtype, device: torch.device, S: int) -> bool:
    """Whether plain matmuls beat the fused kernel: on CPU in bfloat16 they do while a head's scores fit in cache."""
    return device.type == "cpu" and dtype == torch.bfloat16 and 1 < S <= 512


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, visible: torch.Tensor | None
) -> torch.Tensor:
    """The formula as it is written: softmax(q kᵀ / √D) v, softmax in float32."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    some = None if mask.dense is None else mask.dense.any(-1, keepdim=True)  # of the other masks, each row sees itself
    if visible is None and T > 1:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)[None, None]
    if some is not None:
        visible = visible | ~some  # a softmax over nothing would be NaN, and so would its gradient
    q = q.reshape(B, K, H // K * T, D)  # the H/K query heads of one key head side by side
    scores = (q * (1 / math.sqrt(D))) @ k.transpose(-2, -1)  # (B, K, H/K * T, S)
    scores = scores.view(B, K, H // K, T, S).to(torch.promote_types(q.dtype, torch.float32))
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -math.inf)
    weights = scores.softmax(dim=-1).to(v.dtype).view(B, K, H // K * T, S)
    out = (weights @ v).view(B, H, T, D)
    return out if some is None else out.masked_fill(~some, 0)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, visible: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's fused kernels (FlashAttention where there is one)."""
    T, S = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if visible is None and 1 < T < S:  # `is_causal` would line the triangle up with the first key, not the last
        from torch.nn.attention.bias import causal_lower_right  # takes seconds to import, and few need it

        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S), enable_gqa=gqa)
    causal = visible is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=gqa)

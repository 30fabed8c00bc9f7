"""The two back-ends that take a dense mask: the formula itself, and PyTorch's fused kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from attention.mask import Mask

LOG2_E = math.log2(math.e)  # exp(x) = 2^(x LOG2_E)


def layout(mask: Mask, T: int, S: int, device: torch.device) -> torch.Tensor | None:
    """Return the dense mask (B or 1, 1, T, S) bool, True where a query sees a key; None for a plain causal mask.

    The kernels have the causal mask built in; on a CPU only for T == S or T == 1.
    """
    known = mask.plain(S) and (T in (1, S) or device.type == "cuda")
    return None if known else mask.boolean(T, S, device)


def reference_is_fastest(mask: Mask, T: int, S: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether plain matmuls beat the fused kernel: on a CPU in bfloat16, while a head's scores fit its cache."""
    return device.type == "cpu" and dtype == torch.bfloat16 and 1 < S <= 512


class _Softmax(torch.autograd.Function):
    """The softmax over the keys that a query sees, in float32, by powers of 2.

    Those, and a backward pass that needs the weights only: compiled for a CPU, PyTorch's softmax takes longer, because
    it computes exp in both passes (docs/LOG.md).
    """

    @staticmethod
    def forward(ctx, scores: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """Return the weights of `scores` (B, K, H/K, T, S), in the shape and dtype of these."""
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if visible is not None:
            wide = wide.masked_fill(~visible[:, :, None], -math.inf)  # (B or 1, 1, 1, T, S) broadcasts over heads
        powers = ((wide - wide.amax(-1, keepdim=True)) * LOG2_E).exp2()
        weights = (powers * (1 / powers.sum(-1, keepdim=True))).to(scores.dtype)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the scores: weights (upstream - the mean of upstream under the weights)."""
        (weights,) = ctx.saved_tensors
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        product = wide * upstream
        return (product - wide * product.sum(-1, keepdim=True)).to(upstream.dtype), None


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, visible: torch.Tensor | None
) -> torch.Tensor:
    """Return softmax(q kᵀ / √D) v (B, H, T, D), softmax in float32; 0 for queries that see no key."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    # which queries see any key, (B or 1, 1, T, 1); with every other kind of mask each query sees at least itself
    some = None if mask.dense is None else mask.dense.any(-1, keepdim=True)
    if visible is None and T > 1:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)[None, None]  # (1, 1, T, S)
    if some is not None:
        visible = visible | ~some  # a softmax over nothing would be NaN, and so would its gradient
    q = q.reshape(B, K, H // K * T, D)  # the H/K query heads of one key head side by side: k is not repeated
    scores = (q * (1 / math.sqrt(D))) @ k.transpose(-2, -1)  # (B, K, H/K * T, S)
    weights = _Softmax.apply(scores.view(B, K, H // K, T, S), visible)
    out = (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, D)  # heads in the order of q
    return out if some is None else out.masked_fill(~some, 0)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, visible: torch.Tensor | None) -> torch.Tensor:
    """Return the attention output (B, H, T, D) of PyTorch's fused kernels (FlashAttention on a GPU)."""
    T, S = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if visible is None and 1 < T < S:  # `is_causal` would align the triangle with the first key, not the last
        from torch.nn.attention.bias import causal_lower_right  # takes seconds to import, and few need it

        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S), enable_gqa=gqa)
    causal = visible is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=gqa)

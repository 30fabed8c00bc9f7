"""A stand-in for the flash-attn package on a machine without a GPU: its two functions, with the signatures and by the
definitions of flash-attn 2.8, as loops over sequences."""

import math
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D)."""
    return torch.stack([one_sequence(*qkv, causal, window_size) for qkv in zip(q, k, v)])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """q (tokens of all sequences, H, D), k and v likewise -> (tokens, H, D)."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert queries[0] == keys[0] == 0 and queries[-1] == len(q) and keys[-1] == len(k)
    outs = []
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:]):
        assert 0 < q1 - q0 <= max_seqlen_q and k1 - k0 <= max_seqlen_k
        outs.append(one_sequence(q[q0:q1], k[k0:k1], v[k0:k1], causal, window_size))
    return torch.cat(outs)


def one_sequence(q, k, v, causal, window_size):
    """Query i sees keys i + S - T - left .. i + S - T + right; -1 is no bound, and causal makes the right one 0."""
    left, right = window_size
    right = 0 if causal else right
    T, S = len(q), len(k)
    back = torch.arange(S - T, S)[:, None] - torch.arange(S)
    hidden = torch.zeros(T, S, dtype=torch.bool)
    if left >= 0:
        hidden |= back > left
    if right >= 0:
        hidden |= -back > right
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def package() -> ModuleType:
    """To be put into `sys.modules` under its name."""
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", loader=None)
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module

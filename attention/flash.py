"""FlashAttention-2 (Dao 2023, arXiv:2307.08691) by the flash-attn package, for fp16 and bf16 on a CUDA GPU.

Its causal mask is lined up with the last key, as ours is. Packed rows are laid end to end, and where each document
begins is all the kernel is told of them: nothing of size T x T is made, and no work is done across documents.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F

from attention.mask import Mask, document_starts
from hardware import for_compiler

INSTALL = 'pip install "flash-attn>=2.8" --no-build-isolation'
MAX_HEAD_DIM = 256


@for_compiler("assume_constant_result")
def installed() -> bool:
    """Whether the flash-attn package is there."""
    return find_spec("flash_attn") is not None


def takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether its kernels run on this device in this format."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def layout(mask: Mask, T: int, S: int, device: torch.device) -> torch.Tensor | None:
    """Where each document of the batch begins in its rows laid end to end, and where the last one ends, (documents + 1)
    int32: what flash-attn calls `cu_seqlens`. None where no documents are told apart."""
    if mask.dense is not None:
        raise ValueError(
            "flash-attn takes no mask written out, which a cache makes for prompts of unequal lengths: "
            "choose sdpa or auto"
        )
    return None if mask.doc_ids is None else document_bounds(mask.doc_ids)


@for_compiler("disable")  # how many documents there are is known from the data alone
def document_bounds(doc_ids: torch.Tensor) -> torch.Tensor:
    """`cu_seqlens` (documents + 1) int32 of doc_ids (B, T)."""
    begins = document_starts(doc_ids).flatten().nonzero().flatten()
    return F.pad(begins, (0, 1), value=doc_ids.numel()).int()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, bounds: torch.Tensor | None) -> torch.Tensor:
    """Attention output (B, H, T, D)."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T or S, H or K, D)
    # keys from `left` back to 0 ahead, both counted: key j of query i is seen when 0 <= i - j <= left
    options = {"causal": True, "window_size": (-1 if mask.window is None else mask.window - 1, 0)}
    if bounds is None:
        return flash_attn_func(q, k, v, **options).transpose(1, 2)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, H or K, D)
    # no document is longer than T; its very length would cost a wait for the GPU
    out = flash_attn_varlen_func(q, k, v, bounds, bounds, T, T, **options)  # (B * T, H, D)
    return out.view(B, T, H, D).transpose(1, 2)

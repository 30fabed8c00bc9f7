"""FlashAttention-2 (Dao 2023, arXiv:2307.08691) by the flash-attn package, for fp16 and bf16 on a CUDA GPU.

Its causal mask is aligned with the last key, as ours is. Packed rows are concatenated, and the kernel takes the bounds
of the documents: no tensor of size T x T exists, and no work is done across documents.
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
    """Return whether the flash-attn package is installed."""
    return find_spec("flash_attn") is not None


def takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether its kernels run on this device in this dtype."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def is_fastest(mask: Mask, T: int, S: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether "auto" should choose it: wherever it can run."""
    return takes(dtype, device) and mask.dense is None and head_dim <= MAX_HEAD_DIM and installed()


def obstacle(dtype: torch.dtype, device: torch.device, training: bool) -> str | None:
    """Return the error message when flash-attn cannot run with this dtype on this device; None when it can."""
    if takes(dtype, device) and installed():
        return None
    package = "installed" if installed() else "not installed"
    return (
        f"attention by flash needs a CUDA GPU, fp16 or bf16, and the flash-attn package ({INSTALL}); "
        f"found {device.type}, {str(dtype).removeprefix('torch.')}, package {package}"
    )


def layout(mask: Mask, T: int, S: int, device: torch.device) -> torch.Tensor | None:
    """Return the `cu_seqlens` of flash-attn, (documents + 1) int32: the first token of each document in the
    concatenated rows, and the end of the last one. None without doc_ids."""
    if mask.dense is not None:
        raise ValueError(
            "attention by flash takes no dense mask, which a cache needs for prompts of unequal lengths: "
            "choose sdpa or auto"
        )
    return None if mask.doc_ids is None else document_bounds(mask.doc_ids)


@for_compiler("disable")  # the number of documents, which is a shape here, depends on the data
def document_bounds(doc_ids: torch.Tensor) -> torch.Tensor:
    """Return the `cu_seqlens` (documents + 1) int32 of doc_ids (B, T)."""
    begins = document_starts(doc_ids).flatten().nonzero().flatten()  # (B, T) -> (B * T,) -> (documents,)
    return F.pad(begins, (0, 1), value=doc_ids.numel()).int()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, bounds: torch.Tensor | None) -> torch.Tensor:
    """Return the attention output (B, H, T, D); bounds: of `layout`."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T or S, H or K, D)
    # window_size = (left, right), inclusive: query i sees key j when -right <= i - j <= left; -1: no limit
    options = {"causal": True, "window_size": (-1 if mask.window is None else mask.window - 1, 0)}
    if bounds is None:
        return flash_attn_func(q, k, v, **options).transpose(1, 2)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, H or K, D)
    # T bounds the length of every document; the exact maximum would cost a wait for the GPU
    out = flash_attn_varlen_func(q, k, v, bounds, bounds, T, T, **options)  # (B * T, H, D)
    return out.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)

"""PyTorch's flex_attention (Dong et al. 2024, arXiv:2412.05496): a kernel compiled for the mask, which skips blocks of
128 x 128 pairs that are entirely hidden. It needs the compiler to be fast, and a GPU for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attention.mask import Mask, document_starts
from hardware import for_compiler

MIN_LENGTH = 1024  # tokens in a row; below, a dense mask costs less than compiling a kernel


@for_compiler("assume_constant_result")
def installed() -> bool:
    """Return whether its kernels can be compiled for a GPU."""
    return find_spec("triton") is not None


def is_fastest(mask: Mask, T: int, S: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether it beats SDPA with a dense mask: on a GPU, when many keys of long rows are hidden."""
    if device.type != "cuda" or dtype == torch.float64 or not 16 <= head_dim <= 256:
        return False
    return T == S >= MIN_LENGTH and mask.dense is None and not mask.plain(S) and installed()


def obstacle(dtype: torch.dtype, device: torch.device, training: bool) -> str | None:
    """Return the error message when flex would train on another device than a CUDA GPU; None otherwise."""
    if device.type == "cuda" or not training:
        return None
    return f"attention by flex trains on a CUDA GPU only, found {device.type}"


def layout(mask: Mask, T: int, S: int, device: torch.device) -> BlockMask:
    """Return which blocks of (query, key) pairs are visible, entirely or in part."""
    dense, window = mask.dense, mask.window
    # number of each token's document in its row: equal ids that do not touch are different documents
    runs = None if mask.doc_ids is None else document_starts(mask.doc_ids).cumsum(1, dtype=torch.int32)  # (B, T)
    batch = next((len(x) for x in (dense, runs) if x is not None and len(x) > 1), None)  # None: one mask for all rows

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        # indices of row, head, query and key, scalars that the compiler vectorizes; returns bool
        row = b if batch else 0
        if dense is not None:
            return dense[row, 0, i, j]
        back = i + (S - T) - j  # positions from query back to key; the last query is at the last key
        seen = back >= 0
        if window is not None:
            seen = seen & (back < window)
        return seen if runs is None else seen & (runs[row, i] == runs[row, j])

    create = fast_on(device, create_block_mask)
    return create(visible, batch, None, T, S, device=str(device))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, blocks: BlockMask) -> torch.Tensor:
    """Return the attention output (B, H, T, D); blocks: of `layout`."""
    return fast_on(q.device, flex_attention)(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def fast_on(device: torch.device, function: Callable) -> Callable:
    """Return the function compiled for a GPU; unchanged on a CPU and inside a model that is being compiled."""
    return function if torch.compiler.is_compiling() or device.type == "cpu" else compiled(function)


@functools.cache
def compiled(function: Callable) -> Callable:
    """Return the compiled function; the same one for every call."""
    return torch.compile(function)

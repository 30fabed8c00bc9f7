"""PyTorch's flex_attention (Dong et al. 2024, arXiv:2412.05496): a kernel made for the mask, which skips the blocks of
128 x 128 pairs that the mask hides whole. It needs the compiler to be fast, and a GPU to be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attention.mask import Mask, document_starts
from hardware import for_compiler

WORTH = 1024  # tokens a row from which a mask written out costs more than compiling a kernel


@for_compiler("assume_constant_result")
def installed() -> bool:
    """Whether its kernels can be compiled for a GPU."""
    return find_spec("triton") is not None


def helps(mask: Mask, T: int, S: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it beats SDPA with the mask written out: on a GPU, where many keys of long rows are hidden."""
    if device.type != "cuda" or dtype == torch.float64 or not 16 <= head_dim <= 256:
        return False
    return T == S >= WORTH and mask.dense is None and not mask.plain(S) and installed()


def layout(mask: Mask, T: int, S: int, device: torch.device) -> BlockMask:
    """Which blocks of pairs are hidden, in part or whole."""
    dense, window = mask.dense, mask.window
    runs = None if mask.doc_ids is None else document_starts(mask.doc_ids).cumsum(1, dtype=torch.int32)  # (B, T)
    batch = next((len(x) for x in (dense, runs) if x is not None and len(x) > 1), None)  # None: the same for all rows

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        row = b if batch else 0
        if dense is not None:
            return dense[row, 0, i, j]
        back = i + (S - T) - j
        seen = back >= 0
        if window is not None:
            seen = seen & (back < window)
        return seen if runs is None else seen & (runs[row, i] == runs[row, j])

    make = made_for(device, create_block_mask)
    return make(visible, batch, None, T, S, device=str(device))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, blocks: BlockMask) -> torch.Tensor:
    """Attention output (B, H, T, D)."""
    return made_for(q.device, flex_attention)(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def made_for(device: torch.device, function: Callable) -> Callable:
    """The function compiled, on a GPU; when the whole model is being compiled, it is so anyway."""
    return function if torch.compiler.is_compiling() or device.type == "cpu" else compiled(function)


@functools.cache
def compiled(function: Callable) -> Callable:
    """The compiled function, one for all calls."""
    return torch.compile(function)

"""Scaled dot-product attention: one call, several back-ends that agree to rounding.

`q` is (B, H, T, D); `k` and `v` are (B, K, S, D) with K dividing H: query head h reads key head h // (H/K)
(grouped-query attention, Ainslie et al. 2023). A `Mask` says which keys each query may see; the output of a query that
sees none is 0.

    reference   the formula; the fastest on a CPU in bfloat16 while rows are short
    sdpa        PyTorch's fused kernels, everywhere
    flash       the flash-attn package: fp16 and bf16 on a CUDA GPU, packed documents without a T x T mask
    flex        PyTorch's flex_attention: the same on a GPU without flash-attn

A new back-end is a file, a line in `BACKENDS` and its name in `attention.NAMES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from attention import NAMES, dense, flash, flex, shifted_sparse
from attention.mask import Mask
from attention.shifted_sparse import ShiftedSparse

__all__ = ["BACKENDS", "Mask", "ShiftedSparse", "attend", "check", "choose", "in_use", "prepare", "use"]


class Backend(NamedTuple):
    """The functions of one back-end."""

    layout: Callable[..., Any]
    """layout(mask, T, S, device): the mask in the form that the kernel takes"""
    attend: Callable[..., torch.Tensor]
    """attend(q, k, v, mask, layout): attention output (B, H, T, D)"""
    is_fastest: Callable[..., bool] = lambda *case: False
    """is_fastest(mask, T, S, head_dim, dtype, device): whether "auto" should choose it over SDPA"""
    obstacle: Callable[..., str | None] = lambda *case: None
    """obstacle(dtype, device, training): message about why it cannot run, or None"""


BACKENDS = {  # the first one that is fastest wins
    "reference": Backend(dense.layout, dense.reference, dense.reference_is_fastest),
    "sdpa": Backend(dense.layout, dense.sdpa),
    "flash": Backend(flash.layout, flash.attend, flash.is_fastest, flash.obstacle),
    "flex": Backend(flex.layout, flex.attend, flex.is_fastest, flex.obstacle),
}
assert tuple(BACKENDS) == NAMES
_in_use = "auto"  # changed by `use` only


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Return the attention output (B, H, T, D) of q (B, H, T, D) over k, v (B, K, S, D).

    mask: None means causal, aligned so that the last query sees the last key. backend: "auto" means the one that `use`
    has set, or the fastest. Raises ValueError for more queries than keys without a dense mask.
    """
    mask = Mask() if mask is None else mask
    T, S = q.shape[2], k.shape[2]
    # ids and groups belong to tokens that are queries and keys at once
    square = mask.doc_ids is not None or mask.group is not None
    if mask.dense is None and (T > S or (square and T != S)):
        raise ValueError(f"attention of {T} queries over {S} keys needs a dense mask")
    if mask.group is not None:
        # each part of the row is an ordinary attention over fewer tokens
        full = partial(attend, backend=backend)
        return shifted_sparse.attend(full, q, k, v, shifted_sparse.parts(mask, T))
    if backend == "auto":
        backend = choose(mask, T, S, q.shape[-1], q.dtype, q.device)
    return BACKENDS[backend].attend(q, k, v, mask, layout(mask, backend, T, S, q.device))


def prepare(mask: Mask, T: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compute the layout of a mask over T queries and keys before the layers that share it.

    Without this call the first layer computes it; a compiled layer with gradient checkpointing cannot pass it on.
    """
    if mask.group is not None:
        for part in itertools.chain(*shifted_sparse.parts(mask, T)):
            prepare(part.mask, part.length, head_dim, dtype, device)
    else:
        layout(mask, choose(mask, T, T, head_dim, dtype, device), T, T, device)


def layout(mask: Mask, backend: str, T: int, S: int, device: torch.device) -> Any:
    """Return the layout of a mask for a back-end, computed once and kept in the mask for all layers."""
    key = backend, T, S
    if key not in mask.layouts:
        mask.layouts[key] = BACKENDS[backend].layout(mask, T, S, device)
    return mask.layouts[key]


def choose(mask: Mask, T: int, S: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return the name of the back-end that `use` has set; when that is "auto", the fastest one that can do the work."""
    if _in_use != "auto":
        return _in_use
    for name, backend in BACKENDS.items():
        if backend.is_fastest(mask, T, S, head_dim, dtype, device):
            return name
    return "sdpa"


def in_use() -> str:
    """Return the name that `use` has set, "auto" outside of it."""
    return _in_use


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Let every attention inside the block use this back-end ("auto": the fastest)."""
    global _in_use
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"attention should be one of auto, {', '.join(BACKENDS)}, found {backend!r}")
    before, _in_use = _in_use, backend
    try:
        yield
    finally:
        _in_use = before


def check(backend: str, dtype: torch.dtype, device: torch.device, training: bool) -> None:
    """Raise ValueError when a back-end cannot run with this dtype on this device."""
    message = None if backend == "auto" else BACKENDS[backend].obstacle(dtype, device, training)
    if message:
        raise ValueError(f"{message}: choose auto or sdpa")

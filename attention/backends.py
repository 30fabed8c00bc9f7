"""Scaled dot-product attention: one call, several back-ends that agree to rounding.

`q` is (B, H, T, D); `k` and `v` are (B, K, S, D) with K dividing H: query head h reads key head h // (H/K)
(grouped-query attention, Ainslie et al. 2023). What hides keys is said by a `Mask`; a query that may see nothing
gets 0.

    reference   the formula as it is written; the fastest on a CPU in bfloat16 while rows are short
    sdpa        PyTorch's fused kernels, everywhere
    flash       the flash-attn package: fp16 and bf16 on a CUDA GPU, packed documents without a T x T mask
    flex        PyTorch's flex_attention: the same on a GPU without flash-attn
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
    """layout(mask, T, S, device) makes of a mask what attend(q, k, v, mask, layout) takes."""

    layout: Callable[..., Any]
    attend: Callable[..., torch.Tensor]


BACKENDS = {
    "reference": Backend(dense.layout, dense.reference),
    "sdpa": Backend(dense.layout, dense.sdpa),
    "flash": Backend(flash.layout, flash.attend),
    "flex": Backend(flex.layout, flex.attend),
}
assert tuple(BACKENDS) == NAMES
_in_use = "auto"  # set by `use` alone


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Attention output (B, H, T, D). No mask means causal, the last query standing at the last key.

    `backend` auto: the one in use (`use`), else what is fastest here. Raises ValueError where there are more queries
    than keys and no written mask says what they see.
    """
    mask = Mask() if mask is None else mask
    T, S = q.shape[2], k.shape[2]
    square = mask.doc_ids is not None or mask.group is not None  # says something of each token, as query and as key
    if mask.dense is None and (T > S or (square and T != S)):
        raise ValueError(f"attention of {T} queries over {S} keys needs a written mask")
    if mask.group is not None:
        full = partial(attend, backend=backend)
        return shifted_sparse.attend(full, q, k, v, shifted_sparse.parts(mask, T))
    if backend == "auto":
        backend = choose(mask, T, S, q.shape[-1], q.dtype, q.device)
    return BACKENDS[backend].attend(q, k, v, mask, layout(mask, backend, T, S, q.device))


def prepare(mask: Mask, T: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Make what `attend` needs of a mask over T queries and keys, before the layers that share it. Without this call
    the first of them makes it, which a compiled, checkpointed layer may not do for the others."""
    if mask.group is not None:
        for part in itertools.chain(*shifted_sparse.parts(mask, T)):
            prepare(part.mask, part.length, head_dim, dtype, device)
    else:
        layout(mask, choose(mask, T, T, head_dim, dtype, device), T, T, device)


def layout(mask: Mask, backend: str, T: int, S: int, device: torch.device) -> Any:
    """What a back-end makes of a mask; made once, for all layers ask for the same."""
    key = backend, T, S
    if key not in mask.layouts:
        mask.layouts[key] = BACKENDS[backend].layout(mask, T, S, device)
    return mask.layouts[key]


def choose(mask: Mask, T: int, S: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """The back-end in use; when that is auto, the fastest one that can do it."""
    if _in_use != "auto":
        return _in_use
    if dense.fast_reference(dtype, device, S):
        return "reference"
    if flash.takes(dtype, device) and mask.dense is None and head_dim <= flash.MAX_HEAD_DIM and flash.installed():
        return "flash"
    return "flex" if flex.helps(mask, T, S, head_dim, dtype, device) else "sdpa"


def in_use() -> str:
    """The back-end that `use` has chosen; auto: none."""
    return _in_use


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Let everything inside attend by this back-end (auto: by the fastest)."""
    global _in_use
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"there is no attention back-end {backend!r}: choose auto, {', '.join(BACKENDS)}")
    before, _in_use = _in_use, backend
    try:
        yield
    finally:
        _in_use = before


def check(backend: str, dtype: torch.dtype, device: torch.device, training: bool) -> None:
    """Raises ValueError when a back-end that is asked for cannot do its work here."""
    kind = str(dtype).removeprefix("torch.")
    if backend == "flash" and not (flash.takes(dtype, device) and flash.installed()):
        package = "installed" if flash.installed() else "not installed"
        raise ValueError(
            "attention by flash needs a CUDA GPU, fp16 or bf16, and the flash-attn package "
            f"({flash.INSTALL}); found {device.type}, {kind}, package {package}: choose auto or sdpa"
        )
    if backend == "flex" and training and device.type != "cuda":
        raise ValueError(
            f"PyTorch's flex_attention is trained through on a CUDA GPU only, and this is {device.type}: "
            "choose auto or sdpa"
        )

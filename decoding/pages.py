"""Weights in huge pages: the processor fetches ahead within a page only, and pages are 4 KiB unless one asks for more.

A step in float32 or bfloat16 took 0.55 of the time so, together with reading one row after another (docs/speed.md).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import nn

PAGE = 2**21  # bytes of a huge page on x86-64
LINE = 64  # bytes of a cache line, where every tensor begins


def in_huge_pages(module: nn.Module) -> None:
    """Move the weights of a module on a CPU into memory of huge pages, where the system has them.

    Parameters and buffers stay the same objects with the same numbers. Those that are not contiguous stay where they
    are.
    """
    tensors = [each for each in (*module.parameters(), *module.buffers()) if is_movable(each)]
    for tensor, copy in zip(tensors, reserve([tensor.detach() for tensor in tensors])):
        copy.copy_(tensor.detach())
        tensor.data = copy  # the memory of before is free from here on


def is_movable(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is plain memory of its own."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and type(tensor.data) is torch.Tensor
        and tensor.numel() > 0
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    )


def reserve(like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return empty tensors of the same shapes and dtypes, side by side in huge pages; [] where there are none."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    sizes = [-(-tensor.nbytes // LINE) * LINE for tensor in like]
    if advice is None or sum(sizes) < PAGE:
        return []
    memory = mmap.mmap(-1, -(-sum(sizes) // PAGE) * PAGE + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:  # a kernel without them
        return []
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory as long as a part of it lives
    at, empty = -whole.data_ptr() % PAGE, []
    for tensor, size in zip(like, sizes):
        empty.append(whole[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        at += size
    return empty

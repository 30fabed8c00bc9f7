"""Shifted sparse attention (S²-Attn; Chen et al. 2023, LongLoRA, arXiv:2309.12307): cheap training on long rows.

The first half of the heads attends causally inside groups of G tokens, [0, G), [G, 2G) ...; the second half inside
groups shifted by half of one, [0, G/2), [G/2, 3G/2) ..., so that what one group knows reaches its neighbours in the
next layer. Attention over a row of T tokens costs G/T of what it did. Evaluation and decoding attend in full.

The paper's own code shifts by rolling the row around, which puts its last half group and its first into one group, in
this order: the first tokens then see the last ones. Here the row is cut instead, and both stand alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attention.mask import Mask


@dataclass(frozen=True)
class ShiftedSparse:
    """When to attend in groups: in training, over rows of `min_len` tokens or more. Raises ValueError where groups
    cannot be halved."""

    group: int
    min_len: int = 0

    def __post_init__(self) -> None:
        if self.group < 2 or self.group % 2:
            raise ValueError(
                f"a group of shifted sparse attention is shifted by half of it, and {self.group} tokens "
                "cannot be halved: give an even number, 2 or more"
            )

    def group_for(self, T: int, training: bool) -> int | None:
        """Tokens a group in a row of T; None: attend in full."""
        return self.group if training and self.min_len <= T else None


@dataclass
class Part:
    """`n` groups of `length` tokens each, from token `start` on, and what hides keys inside them (rows B * n)."""

    start: int
    n: int
    length: int
    mask: Mask


def parts(mask: Mask, T: int) -> tuple[list[Part], list[Part]]:
    """What the first and the second half of the heads are cut into; made once, for all layers ask for the same."""
    if (halves := mask.layouts.get(T)) is not None:
        return halves
    G = ShiftedSparse(mask.group).group  # refused where it cannot be halved
    if mask.dense is not None:
        raise ValueError("shifted sparse attention is for training: it takes doc_ids and a window, not a written mask")
    mask.layouts[T] = cut(mask, T, G, 0), cut(mask, T, G, G // 2)
    return mask.layouts[T]


def cut(mask: Mask, T: int, G: int, shift: int) -> list[Part]:
    """Up to three parts: the `shift` first tokens, whole groups, and what is left of the row."""
    head = min(shift, T)
    n, tail = (T - head) // G, (T - head) % G  # no divmod: torch.compile has none where T is not fixed
    made = []
    for start, count, length in ((0, 1, head), (head, n, G), (T - tail, 1, tail)):
        if count and length:
            ids = mask.doc_ids
            ids = None if ids is None else ids[:, start : start + count * length].reshape(-1, length)  # (B * n, length)
            made.append(Part(start, count, length, Mask(ids, mask.window)))
    return made


def attend(
    full: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    halves: tuple[list[Part], list[Part]],
) -> torch.Tensor:
    """Attention output (B, H, T, D), by full(q, k, v, mask) over each part. The second half of an odd number of heads
    is the larger one. Raises ValueError where there is one head only."""
    H, K = q.shape[1], k.shape[1]
    if H < 2:
        raise ValueError("shifted sparse attention shifts half of the heads, and this model has one: give it two")
    half, per_kv = H // 2, H // K
    if half % per_kv:  # a key head serves queries of both halves: let each query head have its own
        k, v = k.repeat_interleave(per_kv, 1), v.repeat_interleave(per_kv, 1)  # (B, H, T, D)
        per_kv = 1
    heads = (slice(0, half), slice(0, half // per_kv)), (slice(half, H), slice(half // per_kv, None))
    outs = []
    for (queries, keys), pieces in zip(heads, halves):
        q_half, k_half, v_half = q[:, queries], k[:, keys], v[:, keys]
        done = [ungrouped(full(*(grouped(x, p) for x in (q_half, k_half, v_half)), p.mask), p) for p in pieces]
        outs.append(torch.cat(done, dim=2))
    return torch.cat(outs, dim=1)


def grouped(x: torch.Tensor, part: Part) -> torch.Tensor:
    """The groups of a part as rows: (B, H, T, D) -> (B * n, H, length, D)."""
    B, H, _, D = x.shape
    x = x[:, :, part.start : part.start + part.n * part.length]
    return x.reshape(B, H, part.n, part.length, D).transpose(1, 2).reshape(B * part.n, H, part.length, D)


def ungrouped(x: torch.Tensor, part: Part) -> torch.Tensor:
    """And back: (B * n, H, length, D) -> (B, H, n * length, D)."""
    _, H, length, D = x.shape
    return x.view(-1, part.n, H, length, D).transpose(1, 2).reshape(-1, H, part.n * length, D)

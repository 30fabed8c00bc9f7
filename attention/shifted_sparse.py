"""Shifted sparse attention (S²-Attn; Chen et al. 2023, LongLoRA, arXiv:2309.12307): cheap training on long rows.

The first half of the heads attends causally inside groups of G tokens, [0, G), [G, 2G) ...; the second half inside
groups shifted by half of one, [0, G/2), [G/2, 3G/2) ..., so that information passes between neighbouring groups in the
next layer. Attention over a row of T tokens costs G/T of full attention. Evaluation and decoding use full attention.

The paper's code shifts by rolling the row, which joins its last half group and its first into one group, in this order:
the first tokens then see the last ones. Here the row is cut instead, and the two half groups stay apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attention.mask import Mask


@dataclass(frozen=True)
class ShiftedSparse:
    """The rule of when to attend in groups: in training, over rows of `min_len` tokens or more."""

    group: int
    """number of tokens in a group, even"""
    min_len: int = 0
    """number of tokens in the shortest row that is cut into groups"""

    def __post_init__(self) -> None:
        """Raise ValueError when a group cannot be halved."""
        if self.group < 2 or self.group % 2:
            raise ValueError(f"s2_group should be an even number, 2 or more, found {self.group}")

    def group_for(self, T: int, training: bool) -> int | None:
        """Return the number of tokens of a group in a row of T; None: full attention."""
        return self.group if training and self.min_len <= T else None


@dataclass
class Part:
    """A run of groups of equal length."""

    start: int
    """index of the first token"""
    n: int
    """number of groups"""
    length: int
    """number of tokens in a group"""
    mask: Mask
    """mask inside the groups, which are rows of a batch of B * n"""


def parts(mask: Mask, T: int) -> tuple[list[Part], list[Part]]:
    """Return the parts of a row of T tokens for the first and for the second half of the heads.

    They are kept in the mask for all layers. Raises ValueError for an odd group and for a dense mask.
    """
    if (halves := mask.layouts.get(T)) is not None:
        return halves
    G = ShiftedSparse(mask.group).group  # checks that it can be halved
    if mask.dense is not None:
        raise ValueError("shifted sparse attention is for training: it takes doc_ids and a window, found a dense mask")
    mask.layouts[T] = cut(mask, T, G, 0), cut(mask, T, G, G // 2)
    return mask.layouts[T]


def cut(mask: Mask, T: int, G: int, shift: int) -> list[Part]:
    """Return up to three parts of a row of T tokens: the first `shift` tokens, whole groups of G, and the rest."""
    head = min(shift, T)
    n, tail = (T - head) // G, (T - head) % G  # no divmod: torch.compile has none where T is not fixed
    cuts = []
    for start, count, length in ((0, 1, head), (head, n, G), (T - tail, 1, tail)):
        if count and length:
            ids = mask.doc_ids  # (B, T), or None
            ids = None if ids is None else ids[:, start : start + count * length].reshape(-1, length)  # (B * n, length)
            cuts.append(Part(start, count, length, Mask(ids, mask.window)))
    return cuts


def attend(
    full: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    halves: tuple[list[Part], list[Part]],
) -> torch.Tensor:
    """Return the attention output (B, H, T, D), computed by full(q, k, v, mask) over each part.

    Of an odd number of heads the second half is the larger one. Raises ValueError for a single head.
    """
    H, K = q.shape[1], k.shape[1]
    if H < 2:
        raise ValueError("shifted sparse attention needs n_heads of 2 or more, found 1")
    half, per_kv = H // 2, H // K
    if half % per_kv:  # one key head serves query heads of both halves: repeat keys, so that each has its own
        k, v = k.repeat_interleave(per_kv, 1), v.repeat_interleave(per_kv, 1)  # (B, H, T, D)
        per_kv = 1
    heads = (slice(0, half), slice(0, half // per_kv)), (slice(half, H), slice(half // per_kv, None))
    # slices of the H query heads and the K key heads, for each half
    outs = []
    for (queries, keys), pieces in zip(heads, halves):
        q_half, k_half, v_half = q[:, queries], k[:, keys], v[:, keys]
        outputs = [ungrouped(full(*(grouped(x, p) for x in (q_half, k_half, v_half)), p.mask), p) for p in pieces]
        outs.append(torch.cat(outputs, dim=2))  # (B, H/2, T, D): the parts in the order of the tokens
    return torch.cat(outs, dim=1)


def grouped(x: torch.Tensor, part: Part) -> torch.Tensor:
    """Return the groups of a part as rows: (B, H, T, D) -> (B * n, H, length, D)."""
    B, H, _, D = x.shape
    x = x[:, :, part.start : part.start + part.n * part.length]  # (B, H, n * length, D)
    # -> (B, H, n, length, D) -> (B, n, H, length, D) -> rows
    return x.reshape(B, H, part.n, part.length, D).transpose(1, 2).reshape(B * part.n, H, part.length, D)


def ungrouped(x: torch.Tensor, part: Part) -> torch.Tensor:
    """Return the rows of a part as groups of tokens again: (B * n, H, length, D) -> (B, H, n * length, D)."""
    _, H, length, D = x.shape
    # -> (B, n, H, length, D) -> (B, H, n, length, D) -> tokens
    return x.view(-1, part.n, H, length, D).transpose(1, 2).reshape(-1, H, part.n * length, D)

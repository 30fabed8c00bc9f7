"""Key-value caches for decoding: what every earlier token leaves behind for the later ones.

A cache knows tensors only. `KVCache` keeps everything, slot = position: the token at position p of a row is stored in
slot p, and a query at position p sees the slots j <= p. So a batch of unequal prompts is padded on the right: what the
padding wrote lies beyond each row's own length, where no query of that row can see it, until the row's next tokens
overwrite it. `Int8Cache` is the same in a quarter of float32's memory; `SinkCache` forgets, and never ends.

Keys are stored as they turned (`rotated`) where the position encoding turns every token once and for all, and otherwise
as they were before, to be turned at every use by the positions that `extend` gives.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch


@dataclass
class View:
    """What one forward pass of T tokens sees of a cache with S slots in use."""

    positions: torch.Tensor
    """of the queries, (B or 1, T) int64"""
    mask: torch.Tensor | None
    """which slots each query may see, (B or 1, 1, T, S) bool; None: what its window leaves of those before it, the last
    query standing at the last slot"""
    lengths: int | torch.Tensor
    """of each row's text with these tokens, (B, 1) int64; one number where it is the same for all"""
    key_positions: torch.Tensor | None
    """of the keys, (B or 1, S) int64; None where they are stored as they turned"""


class KVCache:
    """Preallocated cache of keys and values, (n_layers, B, n_kv_heads, max_len, head_dim) each."""

    stored = ("keys", "values")  # names of the tensors, (n_layers, B, n_kv_heads, slots, ...)

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        head_dim: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        window: int | None = None,
        rotated: bool = True,
        text_len: int | None = None,
    ) -> None:
        """window: how far back attention looks (None: all the way). text_len: where frequencies depend on the text's
        length, make them for a text of so many tokens from the start; None: for what has been read."""
        if text_len is not None and text_len < max_len:
            raise ValueError(f"a cache of {max_len} places is too long for a text of text_len {text_len} tokens")
        self.max_len, self.window, self.rotated, self.text_len, self.dtype = max_len, window, rotated, text_len, dtype
        self.allocate((n_layers, batch, n_kv_heads, max_len, head_dim), torch.device(device))
        self.length = 0  # highest position written so far, plus one
        self._slots: slice | torch.Tensor = slice(0, 0)  # where the announced tokens go
        self._used = 0  # slots that a pass looks at

    def allocate(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Make the tensors."""
        self.keys = torch.zeros(shape, dtype=self.dtype, device=device)
        self.values = torch.zeros(shape, dtype=self.dtype, device=device)

    def passes(self, T: int) -> list[int]:
        """How many of the next T tokens are to be fed in each of several forward passes: here all in one."""
        return [T]

    def extend(self, positions: torch.Tensor | None, T: int = 0, lengths: Sequence[int] | None = None) -> View:
        """Announce the tokens of a forward pass before any layer stores them.

        positions (B, T) int64; None: T tokens that go on from `length` in every row, which spares a look at the
        device. lengths: of each row's text with these tokens, where padding on the right makes it less than the last
        position tells; that spares the look, too, when T == 1. Raises ValueError when a position lies outside.
        """
        low, high, in_step = self._span(positions, T, lengths)
        if low < 0 or high >= self.max_len:
            raise ValueError(f"the cache holds positions 0..{self.max_len - 1}, asked to store {low}..{high}")
        self.length = self._used = max(self.length, high + 1)
        slots = torch.arange(self.length, device=self.keys.device)
        if in_step:
            self._slots, positions = slice(low, high + 1), slots[None, low : high + 1]
        else:
            self._slots = positions
        mask = None
        if not in_step or high + 1 < self.length:
            mask = slots <= positions[..., None]  # (B or 1, T, S)
            if self.window is not None:
                mask &= slots > positions[..., None] - self.window
            mask = mask[:, None]
        if self.rotated:
            return View(positions, mask, self.length, None)
        return View(positions, mask, self._text_lengths(positions, in_step, lengths), slots[None])

    def _span(self, positions: torch.Tensor | None, T: int, lengths: Sequence[int] | None) -> tuple[int, int, bool]:
        """Lowest and highest position, and whether every row has the same run of them."""
        if positions is None:
            return self.length, self.length + T - 1, True
        T = positions.shape[1]
        if T == 1 and lengths is not None:
            low, high = min(lengths) - 1, max(lengths) - 1
            return low, high, low == high
        low, high = int(positions.min()), int(positions.max())
        run = torch.arange(low, high + 1, device=positions.device)
        return low, high, high - low + 1 == T and bool((positions == run).all())

    def _text_lengths(
        self, positions: torch.Tensor, in_step: bool, lengths: Sequence[int] | None
    ) -> int | torch.Tensor:
        if self.text_len is not None:
            return self.text_len
        if in_step and (lengths is None or positions.shape[1] == 1):
            return self._slots.stop
        return row_lengths(positions, lengths)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, K, T, D) of one layer at the announced slots; return all so far, (B, K, S, D) each."""
        return self._put(self.keys[layer], k), self._put(self.values[layer], v)

    def _put(self, stored: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Write x (B, K, T, ...) into one layer's (B, K, slots, ...); what a pass looks at, (B, K, S, ...)."""
        if isinstance(self._slots, slice):
            stored[:, :, self._slots] = x
        else:
            rows = torch.arange(x.shape[0], device=x.device)[:, None]  # (B, 1) against the slots' (B or 1, T)
            stored[rows, :, self._slots] = x.transpose(1, 2)
        return stored[:, :, : self._used]

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on (they are overwritten by the next ones)."""
        self.length = min(self.length, length)

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i continue from what row `rows[i]` has seen (beam search, or dropping finished rows)."""
        for name in self.stored:
            setattr(self, name, getattr(self, name)[:, rows].contiguous())

    def append(self, other: KVCache) -> None:
        """Add the rows of another cache, of the same kind and room, after those of this one."""
        for name in self.stored:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)], dim=1))
        self.length = max(self.length, other.length)


def keep_prefix(cache: KVCache, ids: Sequence[int], held: Sequence[int]) -> None:
    """Forget what is no beginning of `ids`; `held` begins with the ids in the cache. At least one of `ids` is left to
    feed, for the logits after it are wanted."""
    both = zip(held[: cache.length], ids[:-1])
    cache.truncate(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both)))


def row_lengths(positions: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
    """How long each row's text is after tokens at `positions` (B or 1, T), some of them padding: (B or 1, 1) int64."""
    reached = positions.amax(1, keepdim=True) + 1
    return reached if lengths is None else reached.minimum(torch.tensor(lengths, device=positions.device)[:, None])


class Int8Cache(KVCache):
    """Keys and values in 8 bits, with one float32 scale for each token and head: no number is off by more than 1/254
    of the largest of its head's vector. Every pass sees them rounded, its own included, so that what comes out does
    not depend on how a text is cut into passes."""

    stored = ("keys", "values", "key_scale", "value_scale")

    def allocate(self, shape: tuple[int, ...], device: torch.device) -> None:
        for name in self.stored:
            scale = name.endswith("scale")
            tensor = torch.zeros(*shape[:-1], 1) if scale else torch.zeros(shape, dtype=torch.int8)
            setattr(self, name, tensor.to(device))

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = ((self.keys, self.key_scale, k), (self.values, self.value_scale, v))
        return tuple(self._rounded(codes[layer], scales[layer], x) for codes, scales, x in parts)

    def _rounded(self, codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30)  # (B, K, T, 1)
        seen = self._put(codes, (x / scale).round().to(torch.int8))
        return seen.to(self.dtype) * self._put(scales, scale).to(self.dtype)


class SinkCache(KVCache):
    """StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): the first `sinks` tokens and the last ones, `max_len` in all.

    A text may go on for ever: with every pass, decoding included, as many of the oldest tokens after the sinks go as
    the new ones need room. Positions are places in the cache and not in the text, so keys are stored before they turn
    and no distance exceeds the cache. A pass of several tokens makes room for all of them first, so what it sees of
    the past depends on how a long text is cut; `passes` cuts it so that half of the recent tokens stay.
    """

    def __init__(self, *shape: int, sinks: int = 4, **options: Any) -> None:
        super().__init__(*shape, **options | {"rotated": False})
        self.capacity, self.sinks, self.recent = self.max_len, sinks, self.max_len - sinks
        if sinks < 0 or self.recent < 1:
            raise ValueError(f"a cache of {self.capacity} places has no room for {sinks} sinks and a recent token")
        if self.window is not None:
            raise ValueError("a model that looks back a fixed window never sees sinks; use the static cache")
        self.max_len = sys.maxsize  # of the text
        self._used = self.capacity

    def allocate(self, shape: tuple[int, ...], device: torch.device) -> None:
        # One slot more than is kept: padding is written there, and nobody looks.
        super().allocate((*shape[:3], shape[3] + 1, shape[4]), device)

    def passes(self, T: int) -> list[int]:
        """As many as have room, then half of the recent ones at a time."""
        first, step = min(T, max(self.capacity - self.length, 0)), max(1, self.recent // 2)
        rest = T - first
        return [n for n in (first, *[step] * (rest // step), rest % step) if n]

    def extend(self, positions: torch.Tensor | None, T: int = 0, lengths: Sequence[int] | None = None) -> View:
        """As `KVCache.extend`; `positions` are those in the text, and the view's those in the cache."""
        if positions is None:
            positions = torch.arange(self.length, self.length + T, device=self.keys.device)[None]
        T, total = positions.shape[1], row_lengths(positions, lengths)  # total (B or 1, 1): tokens so far
        length = max(self.length, int(total.max()))
        if self.recent < T and length > self.capacity:
            raise ValueError(f"a pass of {T} tokens overruns the {self.recent} recent ones that the cache keeps")
        self.length = length
        slots = torch.arange(self.capacity, device=positions.device)  # the sinks, then a ring
        newest = total - 1 - (total - 1 - slots) % self.recent  # (B or 1, S): the last token to fall on a ring's slot
        text = torch.where(slots < self.sinks, slots, newest)  # which token of the text each slot holds
        mask = ((text >= slots) & (text < total))[:, None] & (text[:, None] <= positions[..., None])  # (B or 1, T, S)
        ring = self.sinks + (positions - self.sinks) % self.recent
        self._slots = torch.where(positions < self.sinks, positions, ring)
        self._slots = self._slots.masked_fill(positions >= total, self.capacity)  # padding
        gone = (total - self.capacity).clamp(min=0)  # how many tokens were between the sinks and the recent ones
        key_positions = torch.where(slots < self.sinks, slots, text - gone)
        in_cache = self.text_len or total.clamp(max=self.capacity)
        return View(positions - gone, mask[:, None], in_cache, key_positions)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; all of them where that would bring back some that have gone."""
        self.length = min(self.length, length) if self.length <= self.capacity or length >= self.length else 0


def cache_class(kind: str) -> type[KVCache]:
    """The class of caches of a kind; ValueError where there is none of that name."""
    kinds = {"static": KVCache, "int8": Int8Cache, "sinks": SinkCache}
    if kind not in kinds:
        raise ValueError(f"there is no cache of kind {kind!r}; there are {', '.join(kinds)}")
    return kinds[kind]

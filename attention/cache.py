"""Key-value caches for decoding: the keys and values of earlier tokens, which later tokens attend to.

A cache knows tensors only. `KVCache` keeps all tokens: the token at position p of a row is stored in slot p, and a
query at position p sees the slots j <= p. So prompts of unequal length are padded on the right: the keys of padding lie
beyond each row's own length, where no query of that row sees them, until the row's next tokens overwrite them.
`Int8Cache` does the same in a quarter of float32's memory; `SinkCache` drops old tokens and is endless.

Memory grows with the text, in blocks of slots: a model of a long context answers a few words in a few megabytes.

Keys are stored after rotation (`rotated`) when the position encoding rotates a token by the same angle at every length
of the text, and otherwise before it, to be rotated at every use by the positions that `extend` returns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from attention import CACHES

BLOCK = 256  # slots are allocated in multiples of this


@dataclass
class View:
    """The data that one forward pass of T tokens needs from a cache with S slots in use."""

    positions: torch.Tensor
    """positions of the queries, (B or 1, T) int64"""
    mask: torch.Tensor | None
    """visibility of the slots, (B or 1, 1, T, S) bool; None: causal with the model's window, the last query at the last
    slot"""
    lengths: int | torch.Tensor
    """length of each row's text after these tokens, (B, 1) int64; one number when it is the same for all rows"""
    key_positions: torch.Tensor | None
    """positions of the keys, (B or 1, S) int64; None when they are stored after rotation"""


class KVCache:
    """Cache of keys and values, (n_layers, B, n_kv_heads, slots, head_dim) each; slots are added as a text grows."""

    can_rewind = True
    """whether `truncate` keeps all tokens before the new length, which speculative decoding needs"""
    endless = False
    """whether a text may be longer than the memory, because old tokens are dropped"""
    stored = ("keys", "values")  # names of the tensors, (n_layers, B, n_kv_heads, slots, ...)
    spare = 0
    """number of slots at the end that hold no token"""

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
        """Make a cache for `batch` rows of up to `max_len` tokens.

        window: number of positions that a query sees (None: all). rotated: keys are stored after rotation. text_len:
        length of the text for encodings whose frequencies depend on it, in tokens (None: the tokens read so far).
        Raises ValueError when text_len is below max_len.
        """
        if text_len is not None and text_len < max_len:
            raise ValueError(f"text_len should be at least the cache's max_len {max_len}, found {text_len}")
        self.max_len, self.window, self.rotated, self.text_len, self.dtype = max_len, window, rotated, text_len, dtype
        self.capacity = max_len  # largest number of slots for tokens
        slots = min(max_len, BLOCK) + self.spare
        self.allocate((n_layers, batch, n_kv_heads, slots, head_dim), torch.device(device))
        self.length = 0  # highest position written so far, plus one
        self._slots: slice | torch.Tensor = slice(0, 0)  # slots of the tokens of the present pass
        self._used = 0  # number of slots in use, S

    def allocate(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Allocate keys and values of `shape` (n_layers, B, n_kv_heads, slots, head_dim)."""
        self.keys = torch.zeros(shape, dtype=self.dtype, device=device)
        self.values = torch.zeros(shape, dtype=self.dtype, device=device)

    @property
    def room(self) -> int:
        """Number of slots for tokens that are allocated."""
        return self.keys.shape[3] - self.spare

    def reserve(self, n: int) -> None:
        """Allocate slots for texts of `n` tokens, if there are fewer; n is at most `capacity`."""
        if n > self.room:
            # at least half as much again, so that a long text is copied a few times only
            wanted = max(n, self.room * 3 // 2)
            self.resize(min(self.capacity, BLOCK * -(-wanted // BLOCK)))  # whole blocks, rounded up

    def resize(self, room: int) -> None:
        """Change the number of slots for tokens to `room`, not below that of now; what is stored stays."""
        for name in self.stored:
            old = getattr(self, name)
            with torch.inference_mode(False):  # else nothing outside of inference mode could write to the tensor
                new = old.new_zeros(*old.shape[:3], room + self.spare, *old.shape[4:])
            new[:, :, :, : old.shape[3]] = old
            setattr(self, name, new)

    def passes(self, T: int) -> list[int]:
        """Return how many of the next T tokens each of one or more forward passes has to take: here all in one."""
        return [T]

    def extend(self, positions: torch.Tensor | None, T: int = 0, lengths: Sequence[int] | None = None) -> View:
        """Reserve slots for the tokens of a forward pass, before any layer stores them, and return their view.

        positions (B, T) int64; None: T tokens that continue from `length` in every row. lengths: number of real tokens
        in each row after this pass, needed when rows are padded on the right. Without positions, or with lengths and
        T == 1, nothing is copied from the device. Raises ValueError for a position outside of the cache.
        """
        low, high, in_step = self._span(positions, T, lengths)
        if low < 0 or high >= self.max_len:
            raise ValueError(f"the cache holds positions 0..{self.max_len - 1}, found tokens at {low}..{high}")
        self.reserve(high + 1)
        self.length = self._used = max(self.length, high + 1)
        slots = torch.arange(self.length, device=self.keys.device)  # (S,)
        if in_step:
            # a slice is stored without an index tensor
            self._slots, positions = slice(low, high + 1), slots[None, low : high + 1]
        else:
            self._slots = positions
        mask = None
        # a causal mask is enough only when all rows end at the last slot
        if not in_step or high + 1 < self.length:
            mask = slots <= positions[..., None]  # (B or 1, T, S)
            if self.window is not None:
                mask &= slots > positions[..., None] - self.window
            mask = mask[:, None]  # (B or 1, 1, T, S)
        if self.rotated:
            return View(positions, mask, self.length, None)
        return View(positions, mask, self._text_lengths(positions, in_step, lengths), slots[None])

    def _span(self, positions: torch.Tensor | None, T: int, lengths: Sequence[int] | None) -> tuple[int, int, bool]:
        """Return lowest and highest position, and whether every row has the same run of consecutive positions."""
        if positions is None:
            return self.length, self.length + T - 1, True
        T = positions.shape[1]
        if T == 1 and lengths is not None:  # one real token a row: its position is its length - 1
            low, high = min(lengths) - 1, max(lengths) - 1
            return low, high, low == high
        low, high = int(positions.min()), int(positions.max())  # waits for the device
        run = torch.arange(low, high + 1, device=positions.device)
        return low, high, high - low + 1 == T and bool((positions == run).all())

    def _text_lengths(
        self, positions: torch.Tensor, in_step: bool, lengths: Sequence[int] | None
    ) -> int | torch.Tensor:
        """Return `View.lengths` for keys that are rotated at every use."""
        if self.text_len is not None:
            return self.text_len
        if in_step and (lengths is None or positions.shape[1] == 1):
            return self._slots.stop
        return row_lengths(positions, lengths)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, K, T, D) of one layer in the reserved slots; return all in use, (B, K, S, D) each."""
        return self._put(self.keys[layer], k), self._put(self.values[layer], v)

    def _put(self, stored: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Write x (B, K, T, ...) into the tensor of one layer (B, K, slots, ...); return its (B, K, S, ...) in use."""
        if isinstance(self._slots, slice):
            stored[:, :, self._slots] = x
        else:
            # index tensors (B, 1) and (B or 1, T) around a slice: their dimensions come first, (B, T, K, ...)
            rows = torch.arange(x.shape[0], device=x.device)[:, None]
            stored[rows, :, self._slots] = x.transpose(1, 2)
        return stored[:, :, : self._used]

    def truncate(self, length: int) -> None:
        """Drop the tokens from position `length` on; the next tokens overwrite them."""
        self.length = min(self.length, length)

    def reorder(self, rows: torch.Tensor) -> None:
        """Replace row i by a copy of row `rows[i]` (beam search, or dropping finished rows)."""
        for name in self.stored:
            setattr(self, name, getattr(self, name)[:, rows].contiguous())

    def append(self, other: KVCache) -> None:
        """Add the rows of another cache, of the same kind and limit, after those of this one."""
        room = max(self.room, other.room)
        self.resize(room)
        other.resize(room)
        for name in self.stored:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)], dim=1))
        self.length = max(self.length, other.length)


def keep_prefix(cache: KVCache, ids: Sequence[int], held: Sequence[int]) -> None:
    """Truncate the cache to the longest common prefix of `ids` and `held`, which begins with the ids in the cache.

    The last of `ids` is always left to be fed, so that there are logits to sample from.
    """
    both = zip(held[: cache.length], ids[:-1])
    cache.truncate(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both)))


def row_lengths(positions: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
    """Return the length of each row's text after tokens at `positions` (B or 1, T), (B or 1, 1) int64.

    lengths: number of real tokens in each row, when some of the positions are padding.
    """
    reached = positions.amax(1, keepdim=True) + 1  # (B or 1, 1)
    return reached if lengths is None else reached.minimum(torch.tensor(lengths, device=positions.device)[:, None])


class Int8Cache(KVCache):
    """Keys and values in 8 bits, with one float32 scale for each token and head.

    The error of a number is at most 1/254 of the largest in its head's vector. Every pass reads rounded numbers, those
    of its own tokens included, so that the result does not depend on how a text is cut into passes.
    """

    stored = ("keys", "values", "key_scale", "value_scale")

    def allocate(self, shape: tuple[int, ...], device: torch.device) -> None:
        for name in self.stored:
            scale = name.endswith("scale")
            # scales (n_layers, B, K, slots, 1) float32, codes (..., D)
            tensor = torch.zeros(*shape[:-1], 1) if scale else torch.zeros(shape, dtype=torch.int8)
            setattr(self, name, tensor.to(device))

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = ((self.keys, self.key_scale, k), (self.values, self.value_scale, v))
        return tuple(self._rounded(codes[layer], scales[layer], x) for codes, scales, x in parts)

    def _rounded(self, codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Store x (B, K, T, D) of one layer as codes and scales; return all in use, (B, K, S, D), in `dtype`."""
        # the largest number of a vector becomes 127; a vector of zeros must not divide by zero
        scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30)  # (B, K, T, 1)
        all_codes = self._put(codes, (x / scale).round().to(torch.int8))  # (B, K, S, D)
        return all_codes.to(self.dtype) * self._put(scales, scale).to(self.dtype)


class SinkCache(KVCache):
    """StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): the first `sinks` tokens and the last ones, `max_len` in all.

    Every pass drops as many of the oldest tokens after the sinks as its own tokens need room. Positions are counted in
    the cache and not in the text, so keys are stored before rotation and no distance exceeds the cache. A pass of
    several tokens makes room for all of them first, so the past that it sees depends on how a long text is cut into
    passes; `passes` cuts it so that half of the recent tokens stay.
    """

    can_rewind = False
    endless = True
    spare = 1  # padding is written there

    def __init__(self, *shape: int, sinks: int = 4, **options: Any) -> None:
        """Allocate a cache; arguments as for `KVCache`. sinks: number of first tokens that are never dropped.

        Raises ValueError when there is no room for a recent token, or the model has a window.
        """
        super().__init__(*shape, **options | {"rotated": False})
        self.sinks, self.recent = sinks, self.capacity - sinks
        if sinks < 0 or self.recent < 1:
            raise ValueError(f"sinks should lie in 0..{self.capacity - 1} in a cache of {self.capacity}, found {sinks}")
        if self.window is not None:
            raise ValueError(f"a cache with sinks goes with no sliding_window, found {self.window}: use static")
        self.max_len = sys.maxsize  # limit of the text, not of the memory

    def passes(self, T: int) -> list[int]:
        """Return the sizes of passes: first as many tokens as have room, then half of the recent ones at a time."""
        first, step = min(T, max(self.capacity - self.length, 0)), max(1, self.recent // 2)
        rest = T - first
        return [n for n in (first, *[step] * (rest // step), rest % step) if n]

    def extend(self, positions: torch.Tensor | None, T: int = 0, lengths: Sequence[int] | None = None) -> View:
        """Do the same as `KVCache.extend`; `positions` are counted in the text, those of the view in the cache."""
        if positions is None:
            positions = torch.arange(self.length, self.length + T, device=self.keys.device)[None]
        T, total = positions.shape[1], row_lengths(positions, lengths)  # total (B or 1, 1): tokens so far
        length = max(self.length, int(total.max()))
        if self.recent < T and length > self.capacity:
            raise ValueError(f"a pass should have at most {self.recent} tokens in a full cache, found {T}")
        self.length = length
        self.reserve(min(length, self.capacity))
        self._used = self.room
        # The first slots hold the sinks, the others are a ring: token p lies in slot sinks + (p - sinks) % recent.
        slots = torch.arange(self.room, device=positions.device)  # (S,)
        # the last token written to each slot of the ring: counted back from the newest one, total - 1
        newest = total - 1 - (total - 1 - slots) % self.recent  # (B or 1, S)
        text = torch.where(slots < self.sinks, slots, newest)  # (B or 1, S): position in the text of each slot's token
        # a slot is visible when it has been written, and its token is not after the query
        mask = ((text >= slots) & (text < total))[:, None] & (text[:, None] <= positions[..., None])  # (B or 1, T, S)
        ring = self.sinks + (positions - self.sinks) % self.recent
        self._slots = torch.where(positions < self.sinks, positions, ring)
        self._slots = self._slots.masked_fill(positions >= total, self.room)  # padding
        # positions in the cache: those of recent tokens fall by the number of dropped ones
        dropped = (total - self.capacity).clamp(min=0)  # (B or 1, 1)
        key_positions = torch.where(slots < self.sinks, slots, text - dropped)  # (B or 1, S)
        in_cache = self.text_len or total.clamp(max=self.capacity)
        return View(positions - dropped, mask[:, None], in_cache, key_positions)

    def truncate(self, length: int) -> None:
        """Drop the tokens from position `length` on; all tokens, when some before `length` are dropped already."""
        self.length = min(self.length, length) if self.length <= self.capacity or length >= self.length else 0


KINDS: dict[str, type[KVCache]] = {"static": KVCache, "int8": Int8Cache, "sinks": SinkCache}
assert tuple(KINDS) == CACHES


def cache_class(kind: str) -> type[KVCache]:
    """Return the class of a kind of cache. Raises ValueError for an unknown name."""
    if kind not in KINDS:
        raise ValueError(f"cache should be one of {', '.join(KINDS)}, found {kind!r}")
    return KINDS[kind]

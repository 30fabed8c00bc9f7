"""Key-value caches for decoding: what every earlier token leaves behind for the later ones.

A cache knows tensors only. Slot = position: the token at position p of a row is stored in slot p, and a query at
position p sees the slots j <= p. So a batch of unequal prompts is padded on the right: what the padding wrote lies
beyond each row's own length, where no query of that row can see it, until the row's next tokens overwrite it.
"""

from __future__ import annotations

import torch


class KVCache:
    """Preallocated cache of rotated keys and of values, (n_layers, B, n_kv_heads, max_len, head_dim)."""

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
    ) -> None:
        shape = (n_layers, batch, n_kv_heads, max_len, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_len, self.window = max_len, window
        self.length = 0  # highest position written so far, plus one
        self._slots: slice | torch.Tensor = slice(0, 0)

    def extend(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Announce the tokens of a forward pass, `positions` (B, T) int64, before any layer stores them.

        Returns which slots each may see, (B, 1, T, S) bool with S = `length`, or None where attention needs no mask:
        a prompt from position 0 (plain causal), or single tokens that see everything. Raises ValueError when a
        position lies outside the cache.
        """
        low, high, T = int(positions.min()), int(positions.max()), positions.shape[1]
        if low < 0 or high >= self.max_len:
            raise ValueError(f"the cache holds positions 0..{self.max_len - 1}, asked to store {low}..{high}")
        self.length = max(self.length, high + 1)
        run = torch.arange(low, high + 1, device=positions.device)
        in_step = high - low + 1 == T and bool((positions == run).all())  # every row writes the same run of slots
        self._slots = slice(low, high + 1) if in_step else positions
        if in_step and high + 1 == self.length and (low == 0 or T == 1) and self.window is None:
            return None
        slots = torch.arange(self.length, device=positions.device)
        mask = slots <= positions[..., None]  # (B, T, S)
        if self.window is not None:
            mask &= slots > positions[..., None] - self.window
        return mask[:, None]

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, K, T, D) of one layer at the announced slots; return all so far, (B, K, S, D) each."""
        keys, values = self.keys[layer], self.values[layer]  # (B, K, max_len, D)
        if isinstance(self._slots, slice):
            keys[:, :, self._slots], values[:, :, self._slots] = k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1) against the slots' (B, T)
            keys[rows, :, self._slots], values[rows, :, self._slots] = k.transpose(1, 2), v.transpose(1, 2)
        return keys[:, :, : self.length], values[:, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on (they are overwritten by the next ones)."""
        self.length = min(self.length, length)

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i continue from what row `rows[i]` has seen (beam search, or dropping finished rows)."""
        self.keys, self.values = self.keys[:, rows].contiguous(), self.values[:, rows].contiguous()

"""What hides a key from a query."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F


@dataclass
class Mask:
    """Which of S keys each of T queries may see: those at or before its own place, the last query standing at the last
    key, and of these only the ones of its own document (`doc_ids` (B, T), where T == S; a document is a run of equal
    ids) and less than `window` positions back. Or `dense` (B or 1, 1, T, S) bool, True where a query may look, as it
    is. `group`: and only inside groups of so many tokens, shifted by half a group for half of the heads
    (`shifted_sparse`).

    It says what is wanted; a back-end makes of it what its kernel takes, its layout, once a forward pass.
    """

    doc_ids: torch.Tensor | None = None
    window: int | None = None
    dense: torch.Tensor | None = None
    group: int | None = None
    layouts: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # kept for all layers

    def plain(self, S: int) -> bool:
        """Nothing of S keys is hidden but what comes later."""
        near = self.window is None or self.window >= S
        return self.doc_ids is None and self.dense is None and near

    def boolean(self, T: int, S: int, device: torch.device) -> torch.Tensor:
        """The mask written out, (B or 1, 1, T, S) bool."""
        if self.dense is not None:
            return self.dense
        i, j = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
        visible = (j <= i)[None, None]  # (1, 1, T, S)
        if self.window is not None:
            visible = visible & (i - j < self.window)
        if self.doc_ids is not None:
            runs = document_starts(self.doc_ids).cumsum(1, dtype=torch.int32)  # (B, T)
            visible = visible & (runs[:, None, :, None] == runs[:, None, None, :])
        return visible


def document_starts(doc_ids: torch.Tensor) -> torch.Tensor:
    """Where a document begins, (B, T) bool: at the first token of each row, and at every change of id."""
    return F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)

"""Masks: which keys each query sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F


@dataclass
class Mask:
    """Visibility of S keys to T queries: causal, aligned so that the last query sees the last key.

    A mask describes visibility; each back-end converts it, once a forward pass, to the layout that its kernel takes.
    """

    doc_ids: torch.Tensor | None = None
    """document of each token (B, T), for T == S; a query sees its own document only, a run of equal ids"""
    window: int | None = None
    """number of positions that a query sees, its own included; None: no limit"""
    dense: torch.Tensor | None = None
    """a mask (B or 1, 1, T, S) bool, True where a query sees a key, that replaces all of the rules above"""
    group: int | None = None
    """number of tokens of the groups inside which a query sees keys (`shifted_sparse`); None: no groups"""
    layouts: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """layouts that all layers share, by back-end and shape"""

    def plain(self, S: int) -> bool:
        """Return whether the mask of S keys is causal and nothing more."""
        near = self.window is None or self.window >= S
        return self.doc_ids is None and self.dense is None and near

    def boolean(self, T: int, S: int, device: torch.device) -> torch.Tensor:
        """Return the dense mask, (B or 1, 1, T, S) bool."""
        if self.dense is not None:
            return self.dense
        i, j = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)  # (T, 1), (S,)
        visible = (j <= i)[None, None]  # (1, 1, T, S)
        if self.window is not None:
            visible = visible & (i - j < self.window)
        if self.doc_ids is not None:
            runs = document_starts(self.doc_ids).cumsum(1, dtype=torch.int32)  # (B, T)
            # (B, 1, T, 1) == (B, 1, 1, T)
            visible = visible & (runs[:, None, :, None] == runs[:, None, None, :])
        return visible


def document_starts(doc_ids: torch.Tensor) -> torch.Tensor:
    """Return (B, T) bool, True at the first token of each row and at every change of id."""
    return F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)

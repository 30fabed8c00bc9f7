"""Token bins on disk -> pretraining batches, as a pure function of (seed, step, rank, world)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

IGNORE = -100  # a target that is not trained: no token id, so it cannot hide a real one (0 or pad would)


@dataclass(frozen=True)
class Batch:
    """What one forward takes; every field is (B, T), row by row aligned, on one device.

    A batch source is anything with `batch_size` (rows of one optimizer step over all ranks), `steps_per_epoch` and
    `batch(step, rank, world) -> Batch`: the rows of this rank for the global step counter (epoch = step //
    steps_per_epoch). The union over the ranks of a step is the same for every world size, and rows that only
    fill the last step of an epoch have no target.
    """

    tokens: torch.Tensor
    """int64 ids fed to the model."""
    targets: torch.Tensor
    """int64 ids to predict, already shifted by one; IGNORE (-100) where nothing is trained."""
    positions: torch.Tensor | None = None
    """int64, restarting at every document of a row; None means 0..T-1."""
    doc_ids: torch.Tensor | None = None
    """int32; attention never crosses a change of id, -1 is padding; None means one document a row."""
    loss_weights: torch.Tensor | None = None
    """float32 weight of each target's loss; None means 1."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """How many targets are trained."""
        return int((self.targets != IGNORE).sum())

    def rows(self, start: int, stop: int) -> Batch:
        """The rows start..stop-1 as views: a micro-batch."""
        return self._map(lambda x: x[start:stop])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; the copy does not block when the memory is pinned."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def _map(self, change) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: None if x is None else change(x) for name, x in tensors.items()})

"""Several tasks in one run: how often each is seen, and how much the loss of each counts.

The loss of a step is a mean over the *whole* step, all micro-batches and ranks. With l the loss of a target, sample i,
task k, and w_k the weight of a task among those that the step holds:

    token        sum l / number of targets                              MFTCoder's case1
    sample       mean over i of (mean of l in sample i)                 case2
    task_token   sum_k w_k (mean of l in task k) / sum_k w_k            case3
    task_sample  sum_k w_k (mean over the samples of k) / sum_k w_k     case4
    coba         task_token with weights that follow the convergence of each task, see `CoBa`

MFTCoder (codefuse-ai/MFTCoder, loss_utils.py) takes these means over one micro-batch of one rank, so that its value
depends on how a step is divided; here it does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from chat.samples import Samples
from dataset import IGNORE, Batch, BatchSource


class Weighted:
    """A batch source whose loss_weights make the mean over the targets of a step a mean over its samples or tasks.

    What counts is only the ratio of the weights that come from `source` (1 where it gives none). They are scaled to
    sum to the number of targets of the whole step, which the loop divides by; with `weights` (n_tasks,), also to be
    w_k in each task k, of those that the step holds. Every rank finds the same, since each can make the whole step.
    """

    def __init__(self, source: BatchSource, weights: Sequence[float] | None = None) -> None:
        self.source = source
        self.weights = None if weights is None else np.array(weights, np.float64)
        self.seq_len, self.batch_size = source.seq_len, source.batch_size
        self.steps_per_epoch = source.steps_per_epoch

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of `rank` in the global `step`, weighed."""
        batch = self.source.batch(step, rank, world)
        whole = batch if world == 1 else self.source.batch(step)
        factors = self._factors(whole)[_groups(batch)]  # (B, T)
        return dataclasses.replace(batch, loss_weights=(_weights(batch) * factors).float())

    def _factors(self, whole: Batch) -> torch.Tensor:
        """What the weights in each task are multiplied with, (n_tasks,) float64."""
        sums = torch.bincount(
            _groups(whole).flatten(), _weights(whole).flatten(), 0 if self.weights is None else len(self.weights)
        )
        if self.weights is None:
            return torch.full_like(sums, whole.n_targets / max(sums.sum().item(), 1e-300))
        wanted = torch.from_numpy(self.weights) * (sums > 0)
        return whole.n_targets * wanted / wanted.sum().clamp(min=1e-300) / sums.clamp(min=1e-300)


def _weights(batch: Batch) -> torch.Tensor:
    """Of each target, (B, T) float64; 0 where nothing is trained."""
    wanted = (batch.targets != IGNORE).double()
    return wanted if batch.loss_weights is None else wanted * batch.loss_weights.double()


def _groups(batch: Batch) -> torch.Tensor:
    return torch.zeros_like(batch.targets) if batch.groups is None else batch.groups


# --- which samples ----------------------------------------------------------------------------------------------


def join(parts: Sequence[Samples], temperature: float = 1.0, seed: int = 0) -> tuple[Samples, np.ndarray]:
    """The samples of all tasks, those of the small ones several times, and the task of each, (samples,) int64.

    A task of n samples is seen with a probability proportional to n^(1 / temperature): 1 takes every sample once,
    infinity takes as many of each task. The largest task is taken once, and no sample of another less than that;
    which of them come once more than the others is drawn once.
    """
    if not temperature >= 1:
        raise ValueError(f"the temperature should be 1 (no upsampling) or more, found {temperature}")
    if len(parts) == 1:
        return parts[0], np.zeros(len(parts[0]), np.int64)
    largest = max(len(part) for part in parts)
    chosen = []
    for k, part in enumerate(parts):
        n = len(part)
        wanted = round(largest * (n / largest) ** (1 / temperature)) if n else 0
        extra = np.random.default_rng((seed, k)).permutation(n)[: wanted % n] if n else []
        chosen.append(np.sort(np.concatenate([np.tile(np.arange(n), wanted // n if n else 0), extra]).astype(np.int64)))
    taken = [_take(part, which) for part, which in zip(parts, chosen)]
    lengths = np.concatenate([np.diff(part.offsets.astype(np.int64)) for part in taken])
    stats = {name: sum(part.stats.get(name, 0) for part in parts) for name in parts[0].stats}
    samples = Samples(
        np.concatenate([part.ids for part in taken]),
        np.concatenate([part.mask for part in taken]),
        np.append(0, np.cumsum(lengths)).astype(np.uint64),
        stats,
    )
    return samples, np.repeat(np.arange(len(parts)), [len(which) for which in chosen])


def _take(part: Samples, which: np.ndarray) -> Samples:
    """The samples of these numbers, which may repeat."""
    offsets = part.offsets.astype(np.int64)
    lengths = np.diff(offsets)[which]
    ends = np.append(0, np.cumsum(lengths))
    where = np.repeat(offsets[:-1][which] - ends[:-1], lengths) + np.arange(ends[-1])
    return Samples(part.ids[where], part.mask[where], ends.astype(np.uint64), part.stats)

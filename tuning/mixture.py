"""Several tasks in one run: how often each is seen, and how much the loss of each counts.

The loss of a step is a mean over the *whole* step, all micro-batches and ranks. With l the loss of a target, i a
sample, k a task, and w_k the weight of a task that the step holds:

    token        sum l / number of targets                              MFTCoder's case1
    sample       mean over i of (mean of l in sample i)                 case2
    task_token   sum_k w_k (mean of l in task k) / sum_k w_k            case3
    task_sample  sum_k w_k (mean over the samples of k) / sum_k w_k     case4
    coba         task_token with weights that follow the convergence of each task, see `CoBa`

MFTCoder (codefuse-ai/MFTCoder, loss_utils.py) takes these means over one micro-batch of one rank, so that the loss
depends on how a step is divided into micro-batches; here it does not.
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

    The loss weights of `source` (1 where it has none) are scaled so that they sum to the number of targets of the
    whole step; the loop divides by that number, so the loss becomes a weighted mean. With `weights` (n_tasks,), the
    share of each task k that the step holds is w_k / sum of w. Every rank computes the same factors, because each one
    makes the batch of the whole step.
    """

    def __init__(self, source: BatchSource, weights: Sequence[float] | None = None) -> None:
        self.source = source
        self.weights = None if weights is None else np.array(weights, np.float64)
        self.seq_len, self.batch_size = source.seq_len, source.batch_size
        self.steps_per_epoch = source.steps_per_epoch

    @property
    def packing_efficiency(self) -> float:
        """Share of the positions that samples take, as in the source."""
        return self.source.packing_efficiency

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the rows of `rank` in the global `step`, with weights."""
        batch = self.source.batch(step, rank, world)
        whole = batch if world == 1 else self.source.batch(step)
        factors = self._factors(whole)[_groups(batch)]  # (B, T)
        return dataclasses.replace(batch, loss_weights=(_weights(batch) * factors).float())

    def _factors(self, whole: Batch) -> torch.Tensor:
        """Return the factor for the loss weights of each task in the step `whole`, (n_tasks,) float64."""
        n_tasks = 0 if self.weights is None else len(self.weights)
        sums = torch.bincount(_groups(whole).flatten(), _weights(whole).flatten(), n_tasks)  # of loss weights, by task
        if self.weights is None:  # one factor for all: only the sum over the step changes
            return torch.full_like(sums, whole.n_targets / max(sums.sum().item(), 1e-300))
        # a task that the step lacks gives its share to the others
        present = torch.from_numpy(self.weights) * (sums > 0)
        # 1e-300 instead of 0: without any weight the loss is 0, not NaN
        return whole.n_targets * present / present.sum().clamp(min=1e-300) / sums.clamp(min=1e-300)


def _weights(batch: Batch) -> torch.Tensor:
    """Return the loss weight of each target, (B, T) float64; 0 where there is none."""
    weights = (batch.targets != IGNORE).double()
    return weights if batch.loss_weights is None else weights * batch.loss_weights.double()


def _groups(batch: Batch) -> torch.Tensor:
    """Return the task of each position, (B, T) int64; 0 where the batch has one task only."""
    return torch.zeros_like(batch.targets) if batch.groups is None else batch.groups


# --- which samples ----------------------------------------------------------------------------------------------


def join(parts: Sequence[Samples], temperature: float = 1.0, seed: int = 0) -> tuple[Samples, np.ndarray]:
    """Return the samples of all tasks, repeated by `temperature`, and the task number of each, (samples,) int64.

    A task of n samples gives round(N (n / N)^(1 / temperature)) samples, N being the largest n: at temperature 1 each
    sample comes once, at infinity every task gives N. When that is no multiple of n, random samples of the task, chosen
    by `seed`, come once more than the others. Raises ValueError below temperature 1.
    """
    if not temperature >= 1:
        raise ValueError(f"the temperature should be 1 (no upsampling) or more, found {temperature}")
    if len(parts) == 1:
        return parts[0], np.zeros(len(parts[0]), np.int64)
    largest = max(len(part) for part in parts)
    chosen = []
    for k, part in enumerate(parts):
        n = len(part)
        total = round(largest * (n / largest) ** (1 / temperature)) if n else 0
        # every sample total // n times, and total % n of them once more
        extra = np.random.default_rng((seed, k)).permutation(n)[: total % n] if n else []
        chosen.append(np.sort(np.concatenate([np.tile(np.arange(n), total // n if n else 0), extra]).astype(np.int64)))
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
    """Return the samples of the numbers `which`, which may repeat."""
    offsets = part.offsets.astype(np.int64)
    lengths = np.diff(offsets)[which]
    ends = np.append(0, np.cumsum(lengths))  # (samples + 1,) where they begin and end in the result
    # for each token of the result its place in `part`: the begin of its sample there plus its place in the sample
    where = np.repeat(offsets[:-1][which] - ends[:-1], lengths) + np.arange(ends[-1])
    return Samples(part.ids[where], part.mask[where], ends.astype(np.uint64), part.stats)

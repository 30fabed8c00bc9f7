"""Loss of a model on held-out data: nats per token, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cli.progress import track
from dataset import IGNORE, Batch, BatchSource
from distributed.single import Named, SingleProcess
from training.log import format_metrics
from training.protocols import TrainableModel, take_metrics


@torch.no_grad()
def evaluate(
    model: TrainableModel,
    source: BatchSource,
    token_bytes: np.ndarray | None = None,
    max_batches: int | None = None,
    backend: SingleProcess | None = None,
    micro_batch_size: int = 0,
    group_names: Sequence[str] = (),
    first: int = 0,
) -> dict[str, float]:
    """Return the loss of a model over one epoch of `source`, or over `max_batches` from batch `first` on.

    `loss` is in nats per target. With `token_bytes` (number of UTF-8 bytes of each id) there is also `bits_per_byte`,
    which is comparable between tokenizers. With `group_names` there are also loss/NAME of every group that has a
    target, and `task_mean`, the mean of these, in which every group counts the same. Metrics of the model come
    besides, see `take_metrics`. Every rank takes its rows, `micro_batch_size` at once (0: all), and the sums are over
    all ranks.
    """
    backend = backend or SingleProcess(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    nats, targets, n_bytes, n_groups = 0.0, 0, 0, len(group_names)
    groups = torch.zeros(2, n_groups, dtype=torch.float64)
    n_steps = min(source.steps_per_epoch, max_batches or source.steps_per_epoch)
    for step in track(range(first, first + n_steps), "evaluating", "batches", n_steps, active=backend.main):
        batch = source.batch(step % source.steps_per_epoch, backend.data_rank, backend.data_world)
        for part in batch.split(micro_batch_size):
            micro = part.to(backend.device)
            # .forward: not through torch.compile, which would compile a second graph for a few batches
            options = {"positions": micro.positions, "doc_ids": micro.doc_ids, "token_losses": bool(n_groups)}
            loss, losses = model.forward(micro.tokens, micro.targets, **options)
            nats, targets = nats + loss.item(), targets + micro.n_targets
            if n_groups:
                groups += sums_by_group(losses, micro, n_groups)
        if token_bytes is not None:
            n_bytes += int(token_bytes[batch.targets[batch.targets != IGNORE].numpy()].sum())
    model.train(was_training)
    metrics = take_metrics(model)
    sums: Named = {"nats": nats, "targets": targets, "bytes": n_bytes, "groups": groups}
    return _averages(backend.sum_named(sums | {"metrics": as_tensor(metrics)}), metrics, group_names)


def _averages(sums: Named, metric_names: Iterable[str], group_names: Sequence[str]) -> dict[str, float]:
    """Return what `evaluate` does, from sums over all ranks."""
    n_targets = max(1, sums["targets"])
    metrics = {"loss": sums["nats"] / n_targets}
    metrics |= {name: value / n_targets for name, value in zip(metric_names, sums["metrics"].tolist())}
    if sums["bytes"]:
        metrics["bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
    of_groups = {f"loss/{name}": nats / n for name, nats, n in zip(group_names, *sums["groups"].tolist()) if n}
    mean = {"task_mean": sum(of_groups.values()) / len(of_groups)} if of_groups else {}
    return metrics | mean | of_groups


@dataclass
class HeldOut:
    """The held-out data of a run, and how it is evaluated: on the way on a part of it, at the end on all."""

    source: BatchSource
    metric: str
    """name of the metric that the best checkpoint is chosen by"""
    first_batches: int
    """number of batches of an evaluation on the way; 0: all"""
    token_bytes: np.ndarray | None
    group_names: Sequence[str]
    backend: SingleProcess
    micro_batch_size: int

    def __post_init__(self) -> None:
        """Raise ValueError when there is no such metric. A metric of groups takes all batches: the first ones may lack
        a group."""
        of_groups = ["task_mean", *(f"loss/{name}" for name in self.group_names)] if self.group_names else []
        metrics = ["loss", *["bits_per_byte"] * (self.token_bytes is not None), *of_groups]
        if self.metric not in metrics:
            raise ValueError(f"--train.metric should be one of {', '.join(metrics)}, found {self.metric!r}")
        if self.metric in of_groups or self.first_batches >= self.source.steps_per_epoch:
            self.first_batches = 0

    def evaluate(self, model: TrainableModel, max_batches: int | None = None) -> dict[str, float]:
        """Return the metrics on `max_batches` batches (default: on all)."""
        how = (self.token_bytes, max_batches, self.backend, self.micro_batch_size, self.group_names)
        return evaluate(model, self.source, *how)

    def describe(self, metrics: dict[str, float]) -> str:
        """Return the metrics of an evaluation on the way as one line, with the number of its batches."""
        part = f" (first {self.first_batches} batches)" if self.first_batches else ""
        return f"held-out {format_metrics(metrics)}{part}"


def as_tensor(metrics: dict[str, float]) -> torch.Tensor:
    """Return the values of metrics as float64 (metrics,), to be summed over ranks."""
    return torch.tensor(list(metrics.values()), dtype=torch.float64)


def sums_by_group(token_losses: torch.Tensor, batch: Batch, n_groups: int) -> torch.Tensor:
    """Return the sum of the losses (B, T) of the targets of each group, and their number: (2, groups) float64."""
    losses, targets = token_losses.flatten().double().cpu(), batch.targets.flatten().cpu()
    groups = torch.zeros_like(targets) if batch.groups is None else batch.groups.flatten().cpu()
    columns = torch.stack([losses, torch.ones_like(losses)]) * (targets != IGNORE)  # (2, B * T)
    return torch.zeros(2, n_groups, dtype=torch.float64).index_add_(1, groups, columns)

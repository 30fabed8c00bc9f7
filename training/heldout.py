"""Loss of a model on held-out data: nats per token, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from cli.progress import track
from dataset import IGNORE, Batch, BatchSource
from distributed.single import SingleProcess
from training.args import TrainArgs
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
    with_error: bool = False,
) -> dict[str, float]:
    """Return the loss of a model over one epoch of `source`, or over `max_batches` from batch `first` on.

    `loss` is in nats per target. With `token_bytes` (number of UTF-8 bytes of each id) there is also `bits_per_byte`,
    which is comparable between tokenizers. With `group_names` there are also loss/NAME of every group that has a
    target, and `task_mean`, the mean of these, in which every group counts the same. `with_error` adds `loss_error`,
    the standard error of the loss, where there are two batches or more. Metrics of the model come besides, see
    `take_metrics`. Every rank takes its rows, `micro_batch_size` at once (0: all), and the sums are over all ranks.
    """
    backend = backend or SingleProcess(next(model.parameters()).device)
    forward = backend.evaluation(model)
    was_training = model.training
    model.eval()
    nats, targets, n_bytes, n_groups = 0.0, 0, 0, len(group_names)
    groups = torch.zeros(2, n_groups, dtype=torch.float64)
    n_steps = min(source.steps_per_epoch, max_batches or source.steps_per_epoch)
    of_batches = torch.zeros(2, n_steps if with_error else 0, dtype=torch.float64)  # nats and targets of each
    for step in track(range(first, first + n_steps), "evaluating", "batches", n_steps, active=backend.main):
        before = nats, targets
        batch = source.batch(step % source.steps_per_epoch, backend.data_rank, backend.data_world)
        for part in batch.split(micro_batch_size):
            micro = part.to(backend.device)
            options = {"positions": micro.positions, "doc_ids": micro.doc_ids, "token_losses": n_groups > 0}
            loss, losses = forward(micro.tokens, micro.targets, **options)
            nats, targets = nats + loss.item(), targets + micro.n_targets
            groups += sums_by_group(losses, micro, n_groups)
        if with_error:
            of_batches[:, step - first] = torch.tensor([nats - before[0], targets - before[1]])
        if token_bytes is not None:
            n_bytes += int(token_bytes[batch.targets[batch.targets != IGNORE].numpy()].sum())
    model.train(was_training)
    metrics = take_metrics(model)
    sums = {"nats": nats, "targets": targets, "bytes": n_bytes, "groups": groups, "metrics": list(metrics.values())}
    sums = backend.sum_named(sums | {"batches": of_batches})
    error = loss_error(*sums["batches"]) if n_steps > 1 and with_error else None
    return _averages(sums, metrics, group_names) | ({"loss_error": error} if error is not None else {})


def loss_error(nats: Sequence[float], targets: Sequence[float]) -> float:
    """Return the standard error of sum(nats) / sum(targets), that of a ratio of sums over batches (linearized).

    Neighbouring tokens are not independent, and batches of consecutive tokens nearly are. 95 % of such estimates lie
    within 1.96 standard errors, where there are many batches.
    """
    n, total = len(nats), max(1.0, sum(targets))
    ratio = sum(nats) / total
    squares = sum((a - ratio * b) ** 2 for a, b in zip(nats, targets))
    return math.sqrt(squares * n / (n - 1)) / total


def _averages(sums: dict[str, Any], metric_names: Iterable[str], group_names: Sequence[str]) -> dict[str, float]:
    """Return what `evaluate` does, from sums over all ranks."""
    n_targets = max(1, sums["targets"])
    metrics = {"loss": sums["nats"] / n_targets}
    metrics |= {name: value / n_targets for name, value in zip(metric_names, sums["metrics"])}
    if sums["bytes"]:
        metrics["bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
    of_groups = {f"loss/{name}": nats / n for name, nats, n in zip(group_names, *sums["groups"]) if n}
    mean = {"task_mean": sum(of_groups.values()) / len(of_groups)} if of_groups else {}
    return metrics | mean | of_groups


def batches_on_the_way(args: TrainArgs, source: BatchSource, has_bytes: bool, group_names: Sequence[str]) -> int:
    """Return the number of batches of an evaluation before the last one; 0: all. A metric of groups takes all, since
    the first ones may lack a group. Raises ValueError when --train.metric is none of those that `evaluate` returns."""
    of_groups = ["task_mean", *(f"loss/{name}" for name in group_names)] if group_names else []
    metrics = ["loss", *["bits_per_byte"] * has_bytes, *of_groups]
    if args.metric not in metrics:
        raise ValueError(f"--train.metric should be one of {', '.join(metrics)}, found {args.metric!r}")
    return 0 if args.metric in of_groups or args.eval_batches >= source.steps_per_epoch else args.eval_batches


def sums_by_group(token_losses: torch.Tensor, batch: Batch, n_groups: int) -> torch.Tensor:
    """Return the sum of the losses (B, T) of the targets of each group, and their number: (2, groups) float64."""
    if not n_groups:
        return torch.zeros(2, 0, dtype=torch.float64)
    losses, targets = token_losses.flatten().double().cpu(), batch.targets.flatten().cpu()
    groups = torch.zeros_like(targets) if batch.groups is None else batch.groups.flatten().cpu()
    columns = torch.stack([losses, torch.ones_like(losses)]) * (targets != IGNORE)  # (2, B * T)
    return torch.zeros(2, n_groups, dtype=torch.float64).index_add_(1, groups, columns)

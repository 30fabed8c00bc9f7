"""How good a model is on held-out data: nats per token, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from cli.progress import track
from dataset import IGNORE, Batch, BatchSource
from distributed.single import SingleProcess
from model import Transformer


def shown(measures: dict[str, float]) -> str:
    """Measures in one line."""
    names = [name if "/" in name else name.replace("_", " ") for name in measures]  # of a task, as it is called
    return ", ".join(f"{name} {value:.4f}" for name, value in zip(names, measures.values()))


@torch.no_grad()
def evaluate(
    model: Transformer,
    source: BatchSource,
    token_bytes: np.ndarray | None = None,
    max_batches: int | None = None,
    backend: SingleProcess | None = None,
    micro_batch_size: int = 0,
    group_names: Sequence[str] = (),
    first: int = 0,
) -> dict[str, float]:
    """Loss over one epoch of `source` (or `max_batches`, from batch `first` on): `loss` in nats per target and, with
    `token_bytes` (UTF-8 bytes of each id), `bits_per_byte`, which no choice of tokenizer can flatter; with
    `group_names`, also loss/NAME of every group that has a target, and `task_mean`, the mean of these, in which a group
    of few targets counts as much as one of many. A model may tell more, see `take_measures`.

    Every rank takes its rows, `micro_batch_size` at once (0: all), and the sums are over all ranks.
    """
    backend = backend or SingleProcess(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    nats, targets, n_bytes, n_groups = 0.0, 0, 0, len(group_names)
    by_group = torch.zeros(2, n_groups, dtype=torch.float64)
    n_steps = min(source.steps_per_epoch, max_batches or source.steps_per_epoch)
    for step in track(range(first, first + n_steps), "evaluating", "batches", n_steps, active=backend.main):
        batch = source.batch(step % source.steps_per_epoch, backend.rank, backend.world)
        for part in batch.split(micro_batch_size):
            micro = part.to(backend.device)
            # .forward: not through torch.compile, which would compile a second graph for a few batches
            options = {"positions": micro.positions, "doc_ids": micro.doc_ids, "token_losses": bool(n_groups)}
            loss, told = model.forward(micro.tokens, micro.targets, **options)
            nats, targets = nats + loss.item(), targets + micro.n_targets
            if n_groups:
                by_group += sums_by_group(told, micro, n_groups)
        if token_bytes is not None:
            n_bytes += int(token_bytes[batch.targets[batch.targets != IGNORE].numpy()].sum())
    model.train(was_training)
    told = take_measures(model)
    sums = [nats, targets, n_bytes, *by_group.flatten().tolist(), *told.values()]
    nats, targets, n_bytes, *sums = backend.sum(sums)
    measures = {"loss": nats / max(1, targets)}
    measures |= {name: value / max(1, targets) for name, value in zip(told, sums[by_group.numel() :])}
    if n_bytes:
        measures["bits_per_byte"] = nats / math.log(2) / n_bytes
    parts = zip(group_names, sums, sums[n_groups:])
    of_groups = {f"loss/{name}": group_nats / n for name, group_nats, n in parts if n}
    mean = {"task_mean": sum(of_groups.values()) / len(of_groups)} if of_groups else {}
    return measures | mean | of_groups


def take_measures(model: nn.Module) -> dict[str, float]:
    """What a model tells beside its loss (`model.take_measures()`, if it has that): sums over its targets since it was
    last asked, of the same names on every rank."""
    return getattr(model, "take_measures", dict)()


def sums_by_group(token_losses: torch.Tensor, batch: Batch, n_groups: int) -> torch.Tensor:
    """Of each group of a batch, the sum of the losses (B, T) of its targets and their number: (2, groups) float64."""
    losses, targets = token_losses.flatten().double().cpu(), batch.targets.flatten().cpu()
    groups = torch.zeros_like(targets) if batch.groups is None else batch.groups.flatten().cpu()
    columns = torch.stack([losses, torch.ones_like(losses)]) * (targets != IGNORE)  # (2, B * T)
    return torch.zeros(2, n_groups, dtype=torch.float64).index_add_(1, groups, columns)

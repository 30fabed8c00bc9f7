"""How good a model is on held-out data: nats per token, and bits per byte."""

from __future__ import annotations

import math

import numpy as np
import torch

from dataset import IGNORE, BatchSource
from distributed import SingleProcess
from model import Transformer
from progress import track


def shown(measures: dict[str, float]) -> str:
    """Measures in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measures.items())


@torch.no_grad()
def evaluate(
    model: Transformer,
    source: BatchSource,
    token_bytes: np.ndarray | None = None,
    max_batches: int | None = None,
    backend: SingleProcess | None = None,
    micro_batch_size: int = 0,
) -> dict[str, float]:
    """Loss over one epoch of `source` (or its first `max_batches`): `loss` in nats per target and, with `token_bytes`
    (UTF-8 bytes of each id), `bits_per_byte`, which no choice of tokenizer can flatter.

    Every rank takes its rows, `micro_batch_size` at once (0: all), and the sums are over all ranks.
    """
    backend = backend or SingleProcess(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    nats, targets, n_bytes = 0.0, 0, 0
    n_steps = min(source.steps_per_epoch, max_batches or source.steps_per_epoch)
    for step in track(range(n_steps), "evaluating", "batches", n_steps, active=backend.main):
        batch = source.batch(step, backend.rank, backend.world)
        for part in batch.split(micro_batch_size):
            micro = part.to(backend.device)
            # .forward: not through torch.compile, which would compile a second graph for a few batches
            loss, count = model.forward(micro.tokens, micro.targets, positions=micro.positions, doc_ids=micro.doc_ids)
            nats, targets = nats + loss.item(), targets + count.item()
        if token_bytes is not None:
            n_bytes += int(token_bytes[batch.targets[batch.targets != IGNORE].numpy()].sum())
    model.train(was_training)
    nats, targets, n_bytes = backend.sum([nats, targets, n_bytes])
    measures = {"loss": nats / max(1, targets)}
    if n_bytes:
        measures["bits_per_byte"] = nats / math.log(2) / n_bytes
    return measures

"""What the loop asks of the objects that a script hands to it, as types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class TrainableModel(Protocol):
    """An `nn.Module` that the loop trains and evaluates: `Transformer`, `TransformersModel`, `PreferenceModel`."""

    args: Any
    """shape: `dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, max_seq_len`, as in `ModelArgs`"""
    compute_dtype: torch.dtype | None
    """dtype of activations; None: that of the parameters"""
    gradient_checkpointing: bool

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        token_losses: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the weighted losses and the number of targets, or with `token_losses` the loss of each
        target (B, T) without its weight. The caller divides by the number of targets of the whole step, over
        micro-batches and ranks.

        All arguments are (B, T): tokens and targets int64, targets already shifted and -100 where ignored; positions
        restart per document; attention never crosses a change of doc_ids; loss_weights float32.
        """

    def compile(self) -> None:
        """Let torch.compile run the forward pass, in place: parameters keep their names."""

    def n_parameters(self) -> int:
        """Return the number of parameters, tied ones counted once."""


def take_metrics(model: TrainableModel) -> dict[str, float]:
    """Return and reset the metrics that a model collects beside its loss (`take_metrics`, for example the margin of
    DPO): sums over its targets, under the same names on every rank. {} for a model without the method."""
    return getattr(model, "take_metrics", dict)()


class Adaptive(Protocol):
    """What changes in the course of a run beside the weights, for example how much each task counts."""

    def after_step(self, step: int) -> dict[str, float]:
        """Return values for the log; called on every rank after each step."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that later steps depend on, in plain containers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Share(Protocol):
    """What one process writes of a sharded checkpoint; no step changes it."""

    folder: Path
    """directory of the files of all processes"""

    def write(self) -> tuple[list[Any], list[Path]]:
        """Write it, in any thread; return what `finish` needs of every process, and the files."""

    def finish(self, results: list[list[Any]]) -> None:
        """Write what makes the files of all processes one checkpoint; results: of their `write`, by rank."""


class Shards(Protocol):
    """How a model is saved in the parts that its processes have, and read again."""

    def start(
        self,
        directory: Path,
        weights: Mapping[nn.Parameter, torch.Tensor],
        moments: Mapping[str, Mapping[str, torch.Tensor]],
        rank: int,
        gather: Callable[[Any], list[Any]],
    ) -> Share:
        """Return a copy of what this process has to write; every rank calls it, with what `backend.parts` returned."""

    def moments(self, directory: Path) -> dict[str, Mapping[str, torch.Tensor]]:
        """Return the moments in a checkpoint by name of the parameter; {} where it is not in parts."""

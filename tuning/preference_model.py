"""A language model whose loss is that of pairs of answers, one preferred to the other.

    tuned = PreferenceModel(model, DPO(beta=0.1))
    tuned.reference = reference(tuned, [data, heldout], backend, cache)     only where the objective has one
    Trainer(tuned, optimizer, data, ...)

The doc_id of a text says which one it is: 2i is the chosen answer to prompt i, 2i + 1 the rejected one, see
dataset_sft.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from checkpoint.transformers_model import TransformersModel
from dataset import IGNORE
from loss import linear_log_probs
from model import Transformer
from model_args import ModelArgs


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of n pairs of answers, each summed over the answer's tokens: (n,) float64."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    n_chosen: torch.Tensor  # number of tokens of each answer
    n_rejected: torch.Tensor
    ref_chosen: torch.Tensor | None = None  # log-probabilities by the reference model, where there is one
    ref_rejected: torch.Tensor | None = None


class PairLoss(Protocol):
    """A loss of pairs, with numbers that tell whether it works."""

    metrics: tuple[str, ...]

    def __call__(self, pairs: Pairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of each pair, (n,), and each of `metrics`, (n,) without gradients."""
        ...


class PreferenceModel(nn.Module):
    """A language model and a loss of pairs: `forward` sums the loss of the pairs of a batch and counts the pairs.

    It keeps the protocol of a trainable model: `args`, `compute_dtype`, `gradient_checkpointing` and `n_parameters` are
    those of the model inside, `compile` and `take_metrics` its own. `reference` holds the log-probability that the
    reference gives each text, (texts,) by doc_id, on the model's device.
    """

    def __init__(self, model: Transformer | TransformersModel, objective: PairLoss) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.reference: torch.Tensor | None = None
        self._compiled: Callable[..., torch.Tensor] | None = None
        self._sums: dict[str, Any] = dict.fromkeys(objective.metrics, 0.0)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        doc_ids: torch.Tensor,
        loss_weights: None = None,
        token_losses: Literal[False] = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses of the pairs and the number of pairs.

        Arguments as in `Transformer.forward`; the batch is from a `PairData`, so that it holds both texts of each pair.
        """
        texts, log_p, n_tokens = self.text_log_probs(tokens, targets, positions, doc_ids)  # (2n,) each
        # (2n,) -> (n, 2) -> two of (n,): texts are sorted, so the two of a pair are neighbours
        chosen, rejected = log_p.view(-1, 2).unbind(1)
        n_chosen, n_rejected = n_tokens.view(-1, 2).unbind(1)
        ref = (None, None) if self.reference is None else self.reference[texts].view(-1, 2).unbind(1)
        loss, metrics = self.objective(Pairs(chosen, rejected, n_chosen, n_rejected, *ref))  # (n,)
        for name, values in metrics.items():
            self._sums[name] = self._sums[name] + values.sum()
        return loss.sum(), torch.tensor(len(loss))

    def text_log_probs(
        self, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None, doc_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return, for the texts of a batch in the order of their doc_ids: the doc_ids, the sum of the log-probabilities
        of each text's targets, and the number of these targets; (texts,) each."""
        compiled = self._compiled if self.training else None  # evaluated uncompiled: not worth a second graph
        log_p = (compiled or self.token_log_probs)(tokens, targets, positions, doc_ids)  # (B, T)
        # a thousand terms are summed: float64, which mps does not have
        wide = torch.float32 if log_p.device.type == "mps" else torch.float64
        texts, which = doc_ids.unique(return_inverse=True)  # (texts,) rising; (B, T) the index of each token's text
        sums = log_p.new_zeros(len(texts), dtype=wide).index_add(0, which.flatten(), log_p.flatten().to(wide))
        counts = which[targets != IGNORE].bincount(minlength=len(texts)).to(wide)
        real = texts >= 0  # the padding of a row has doc_id -1
        return texts[real].long(), sums[real], counts[real]

    def token_log_probs(
        self, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None, doc_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return log p of each target, (B, T) float32, 0 where the target is ignored."""
        hidden = self.model.hidden(tokens, positions=positions, doc_ids=doc_ids)
        if isinstance(self.model, Transformer):
            flat = linear_log_probs(hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten())  # (B * T,)
            return flat.view(targets.shape)
        log_p = self.model.logits(hidden).log_softmax(-1)  # (B, T, V)
        return log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == IGNORE, 0.0)

    def take_metrics(self) -> dict[str, float]:
        """Return and reset the sums of the objective's metrics over pairs."""
        sums, self._sums = self._sums, dict.fromkeys(self.objective.metrics, 0.0)
        return {name: float(value) for name, value in sums.items()}

    # ---- the protocol of a trainable model

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the part that works token by token; the part after it depends on the number of pairs in a batch."""
        if isinstance(self.model, Transformer):
            self._compiled = torch.compile(self.token_log_probs, *args, **kwargs)

    @property
    def args(self) -> ModelArgs:
        """Shape of the model that is trained."""
        return self.model.args

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype of activations and matrix products."""
        return self.model.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.model.compute_dtype = dtype

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each block is computed again in the backward pass instead of kept."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.model.gradient_checkpointing = on

    def n_parameters(self) -> int:
        """Return the number of parameters, tied ones counted once."""
        return self.model.n_parameters()

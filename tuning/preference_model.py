"""Learning from pairs of answers, one preferred to the other: DPO and ORPO as a model whose loss is of pairs.

    objective = make_objective("dpo", PreferenceArgs(beta=0.1))
    tuned = PreferenceModel(model, objective)
    tuned.reference = reference(tuned, [data, heldout], backend, cache)     only where the objective has one
    Trainer(tuned, optimizer, data, ...)

A text is known by its doc_id: 2i is the chosen answer to prompt i, 2i + 1 the rejected one (dataset_sft.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from checkpoint.transformers_model import TransformersModel
from dataset import IGNORE
from loss import linear_log_probs
from model import Transformer
from model_args import ModelArgs
from tuning.objectives import Objective, Pairs


class PreferenceModel(nn.Module):
    """A language model seen through an objective: `forward` sums the loss of the pairs of a batch and counts them.

    `reference`: the log-probability that the reference gives each text, by doc_id, on the model's device. To the
    training loop it is a model like others; `take_metrics` returns the objective's metrics beside the loss.
    """

    def __init__(self, model: Transformer | TransformersModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.reference: torch.Tensor | None = None
        self._compiled: Callable[..., torch.Tensor] | None = None
        self._sums: dict[str, Any] = dict.fromkeys(objective.measures, 0.0)

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
        """The sum of the losses of the pairs, and their number; arguments as of `Transformer.forward`, from a
        `PairData`: both texts of a pair are there."""
        texts, log_p, n_tokens = self.text_log_probs(tokens, targets, positions, doc_ids)  # (2n,) each
        ref = (None, None) if self.reference is None else self.reference[texts].view(-1, 2).unbind(1)
        loss, measures = self.objective(
            Pairs(*log_p.view(-1, 2).unbind(1), *n_tokens.view(-1, 2).unbind(1), *ref)
        )  # (n,)
        for name, values in measures.items():
            self._sums[name] = self._sums[name] + values.sum()
        return loss.sum(), torch.tensor(len(loss))

    def text_log_probs(
        self, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None, doc_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For the texts of a batch, in the order of their doc_ids: these, the log-probability of each one's targets
        together, and how many these are."""
        compiled = self._compiled if self.training else None  # a second graph for a few held-out batches: no
        log_p = (compiled or self.token_log_probs)(tokens, targets, positions, doc_ids)  # (B, T)
        wide = torch.float32 if log_p.device.type == "mps" else torch.float64  # a thousand terms are summed
        texts, which = doc_ids.unique(return_inverse=True)  # rising; which (B, T)
        sums = log_p.new_zeros(len(texts), dtype=wide).index_add(0, which.flatten(), log_p.flatten().to(wide))
        counts = which[targets != IGNORE].bincount(minlength=len(texts)).to(wide)
        real = texts >= 0
        return texts[real].long(), sums[real], counts[real]

    def token_log_probs(
        self, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None, doc_ids: torch.Tensor
    ) -> torch.Tensor:
        """log p of each target, (B, T) float32, 0 where ignored."""
        hidden = self.model.hidden(tokens, positions=positions, doc_ids=doc_ids)
        if isinstance(self.model, Transformer):
            flat = linear_log_probs(hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten())
            return flat.view(targets.shape)
        log_p = self.model.logits(hidden).log_softmax(-1)  # (B, T, V)
        return log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == IGNORE, 0.0)

    def take_metrics(self) -> dict[str, float]:
        """Return and reset the sums of the objective's metrics over pairs."""
        sums, self._sums = self._sums, dict.fromkeys(self.objective.measures, 0.0)
        return {name: float(value) for name, value in sums.items()}

    # ---- what the training loop sets and asks of a model

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what is per token; how many pairs a batch has differs from one to the next."""
        if isinstance(self.model, Transformer):
            self._compiled = torch.compile(self.token_log_probs, *args, **kwargs)

    @property
    def args(self) -> ModelArgs:
        """The shape of the model."""
        return self.model.args

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype of activations."""
        return self.model.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.model.compute_dtype = dtype

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute each block in the backward pass instead of keeping it."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.model.gradient_checkpointing = on

    def n_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return self.model.n_parameters()


# ---- the reference: the model as it is before it is trained

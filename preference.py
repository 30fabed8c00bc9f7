"""Learning from pairs of answers, one preferred to the other: DPO and ORPO as a model whose loss is of pairs.

    objective = make_objective("dpo", PreferenceArgs(beta=0.1))
    tuned = PreferenceModel(model, objective)
    tuned.reference = reference(tuned, [data, heldout], backend, cache)     only where the objective has one
    Trainer(tuned, optimizer, data, ...)

A text is known by its doc_id: 2i is the chosen answer to prompt i, 2i + 1 the rejected one (pairs.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataset import IGNORE
from distributed import SingleProcess
from foreign import ForeignModel
from loss import linear_log_probs
from model import ModelArgs, Transformer
from pairs import PairData
from progress import track


@dataclass(frozen=True)
class PreferenceArgs:
    """What is learnt from pairs of answers."""

    beta: float = 0.1
    """DPO: how dearly distance from the reference is paid (less of it lets the model go further); ORPO: the weight of
    the odds ratio beside the loss on the chosen answer (lambda in its paper)"""
    label_smoothing: float = 0.0
    """DPO: the share of pairs that are taken to be the wrong way round (conservative DPO)"""
    sft_weight: float = 0.0
    """DPO: the weight of the chosen answer's own loss a token, which keeps it from becoming less probable"""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta should be above 0, and finite, found {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing should be from 0 to below 0.5, where no answer is preferred any more, "
                f"found {self.label_smoothing}"
            )
        if not 0 <= self.sft_weight < math.inf:
            raise ValueError(f"sft_weight should be 0 or more, and finite, found {self.sft_weight}")


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of n pairs of answers, each summed over the answer's tokens: (n,) float64."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    n_chosen: torch.Tensor
    """tokens of each answer"""
    n_rejected: torch.Tensor
    ref_chosen: torch.Tensor | None = None
    """by the reference model, where there is one"""
    ref_rejected: torch.Tensor | None = None


class Objective(Protocol):
    """A loss of pairs, and what tells whether it is working."""

    measures: tuple[str, ...]
    has_reference: bool

    def __call__(self, pairs: Pairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each pair, (n,), and each of `measures`, (n,) without gradients."""
        ...


def compared(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rewards (n,), their difference, and how often the chosen answer has the larger one: chance, and a tie, is 0.5."""
    margin = chosen - rejected
    right = (margin.sign() + 1) / 2
    return {"reward_chosen": chosen, "reward_rejected": rejected, "margin": margin, "accuracy": right}


@dataclass(frozen=True)
class DPO:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): -log sigmoid of the difference
    of the rewards beta log(p / p_ref).

    With `label_smoothing` e a pair counts as the other way round by e (cDPO, Mitchell 2023). `sft_weight` adds the
    chosen answer's loss, divided by its length (as Pang et al. 2024, arXiv:2404.19733, eq. 2). `log_ratio_chosen` and
    `log_ratio_rejected` are log(p / p_ref) a token: how far the model has gone from the reference on either.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    measures = ("reward_chosen", "reward_rejected", "margin", "accuracy", "log_ratio_chosen", "log_ratio_rejected")
    has_reference = True

    def __call__(self, pairs: Pairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        margin = self.beta * (chosen - rejected)
        e = self.label_smoothing
        loss = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
        loss = loss - self.sft_weight * pairs.chosen / pairs.n_chosen
        chosen, rejected = chosen.detach(), rejected.detach()
        ratios = {"log_ratio_chosen": chosen / pairs.n_chosen, "log_ratio_rejected": rejected / pairs.n_rejected}
        return loss, compared(self.beta * chosen, self.beta * rejected) | ratios


@dataclass(frozen=True)
class ORPO:
    """Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7), without a reference: the
    chosen answer's loss, and beta (the paper's lambda) times -log sigmoid of the log odds ratio.

    Both are of log-probabilities divided by the length of the answer. The rewards are beta times these.
    """

    beta: float = 0.1

    measures = ("reward_chosen", "reward_rejected", "margin", "accuracy", "sft_loss", "log_odds_ratio")
    has_reference = False

    def __call__(self, pairs: Pairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen, rejected = pairs.chosen / pairs.n_chosen, pairs.rejected / pairs.n_rejected
        ratio = log_odds(chosen) - log_odds(rejected)
        loss = -chosen - self.beta * F.logsigmoid(ratio)
        chosen, rejected = chosen.detach(), rejected.detach()
        measures = compared(self.beta * chosen, self.beta * rejected)
        return loss, measures | {"sft_loss": -chosen, "log_odds_ratio": ratio.detach()}


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log p <= 0, where p is next to 0 and to 1, too (log1mexp of Maechler 2012)."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)  # of certainty the odds are infinite
    near_one = log_p > -math.log(2)
    far = log_p.masked_fill(near_one, -1.0)  # what is not taken must not make NaN of the gradient
    return log_p - torch.where(near_one, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(far)))


def make_objective(name: Literal["dpo", "orpo"], args: PreferenceArgs) -> Objective:
    """The objective of that name; ValueError for settings that it does not have."""
    if name == "dpo":
        return DPO(args.beta, args.label_smoothing, args.sft_weight)
    if args.label_smoothing or args.sft_weight:
        raise ValueError("label_smoothing and sft_weight are settings of dpo; orpo has beta only")
    return ORPO(args.beta)


class PreferenceModel(nn.Module):
    """A language model seen through an objective: `forward` sums the loss of the pairs of a batch and counts them.

    `reference`: the log-probability that the reference gives each text, by doc_id, on the model's device. To the
    training loop it is a model like others; `take_measures` is what it knows beside the loss.
    """

    def __init__(self, model: Transformer | ForeignModel, objective: Objective) -> None:
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

    def take_measures(self) -> dict[str, float]:
        """The sums of the objective's measures over the pairs since it was last asked."""
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


def reference(
    tuned: PreferenceModel, sources: Sequence[PairData], backend: SingleProcess, cache: Path, micro_batch_size: int = 0
) -> torch.Tensor:
    """The log-probability that the model gives each text of `sources` now, by doc_id: (texts,) on its device.

    All ranks share the work, `micro_batch_size` rows at once (0: all of a rank's). The file `cache` keeps the result,
    and is made anew when weights, shape or dtype of the model or the texts are others than those it is of.
    """
    key = digest(tuned.model, sources)
    known = [read_cache(cache, key)]
    if not all(backend.gather(known[0] is not None)):  # all ranks have it, or all of them work
        known = backend.gather(_log_probs(tuned, sources, backend, micro_batch_size))
        if backend.main:
            write_cache(cache, key, np.fmax.reduce(known))
    wide = torch.float32 if backend.device.type == "mps" else torch.float64
    return torch.from_numpy(np.fmax.reduce(known)).to(backend.device, wide)


@torch.no_grad()
def _log_probs(
    tuned: PreferenceModel, sources: Sequence[PairData], backend: SingleProcess, micro_batch_size: int
) -> np.ndarray:
    """The log-probabilities of the texts in this rank's rows; NaN for the others."""
    found = np.full(2 * sum(source.n_pairs for source in sources), np.nan)
    was_training = tuned.training
    tuned.eval()
    steps = [(source, step) for source in sources for step in range(source.steps_per_epoch)]
    for source, step in track(steps, "asking the reference", "batches", len(steps), active=backend.main):
        for part in source.batch(step, backend.rank, backend.world).split(micro_batch_size):
            micro = part.to(backend.device)
            texts, log_p, _ = tuned.text_log_probs(micro.tokens, micro.targets, micro.positions, micro.doc_ids)
            found[texts.cpu().numpy()] = log_p.cpu().numpy()
    tuned.train(was_training)
    return found


def digest(model: Transformer | ForeignModel, sources: Sequence[PairData]) -> str:
    """What the reference's log-probabilities depend on, as a hex SHA-256."""
    told = hashlib.sha256(f"{model.args} {model.compute_dtype}".encode())
    for name, tensor in model.state_dict().items():
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        told.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for source in sources:
        told.update(f"pairs from {source.first}".encode())
        for array in (source.samples.ids, source.samples.mask, source.samples.offsets):
            told.update(np.ascontiguousarray(array))
    return told.hexdigest()


def read_cache(path: Path, key: str) -> np.ndarray | None:
    """What `write_cache` wrote under the same key, if it did."""
    if not path.is_file():
        return None
    with np.load(path) as stored:
        return stored["log_probs"] if str(stored["key"]) == key else None


def write_cache(path: Path, key: str, log_probs: np.ndarray) -> None:
    """Write the file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("wb") as file:
        np.savez(file, key=key, log_probs=log_probs)
    aside.replace(path)

"""Losses on pairs of answers, one preferred to the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from tuning.args import PreferenceArgs


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

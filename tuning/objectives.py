"""The objectives of fine-tuning: supervised fine-tuning on conversations, and losses on pairs of answers.

An objective makes the batches and gives the model its loss; fine_tuning.py does the rest. Its `kind` says which records
it learns from, `of_tokens` whether the loss is a mean over tokens, so that it can be given in bits per byte. To add a
loss on pairs: a subclass of `Pairwise` here, in OBJECTIVES, and its name and settings in tuning/args.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from attention import backends
from chat.samples import CONVERSATIONS, PAIRS
from checkpoint.transformers_model import TransformersModel
from dataset import BatchSource
from dataset_sft import PairData, SFTData
from distributed.single import SingleProcess
from model import Transformer
from training.args import TrainArgs
from training.precision import prepare
from tuning import args as flags
from tuning import mixture
from tuning.args import DataArgs, PreferenceArgs
from tuning.data import Split
from tuning.preference_model import Pairs, PreferenceModel
from tuning.reference import reference


class SFT:
    """Supervised fine-tuning: cross-entropy on the answers of conversations."""

    kind, of_tokens = CONVERSATIONS, True

    def batches(self, data: DataArgs, split: Split, seed: int) -> tuple[BatchSource, SFTData | None]:
        """Return the batches to train on, weighted as --data.loss says, and those to evaluate on."""
        shape = {"seq_len": data.seq_len, "batch_size": data.batch_size}
        several = len(data.tasks) > 1
        samples, groups = mixture.join(split.trained, data.temperature, seed)
        groups = groups if several else None
        per_sample = data.loss in ("sample", "task_sample")
        source = SFTData(samples, **shape, seed=seed, packing=data.packing, groups=groups, per_sample=per_sample)
        if data.loss != "token":
            weights = None if data.loss == "sample" else [task.weight for task in data.tasks]
            source = mixture.Weighted(source, weights)
        if split.heldout is None:
            return source, None
        samples, groups = mixture.join(split.heldout)
        # no answer is judged by its second half alone, as concatenation would do
        packing = "best_fit" if data.packing == "concat" else data.packing
        # several tasks are shuffled, so that the first batches hold something of each
        options = {"packing": packing, "shuffle": several, "groups": groups if several else None}
        return source, SFTData(samples, **shape, seed=0, **options)

    def wrap(self, model: Transformer | TransformersModel, *_: object) -> Transformer | TransformersModel:
        """Return the model as it is: its own loss is cross-entropy."""
        return model


class Pairwise:
    """What the objectives on pairs of answers, one preferred to the other, have in common.

    A subclass is a loss: `objective(pairs)` returns the loss of each pair, (n,), and each of `metrics`, (n,) without
    gradients. `has_reference`: the loss compares the model with itself before training.
    """

    kind, of_tokens = PAIRS, False
    metrics: tuple[str, ...] = ()
    has_reference = False

    def batches(self, data: DataArgs, split: Split, seed: int) -> tuple[PairData, PairData | None]:
        """Return the batches to train on and those to evaluate on; their pairs are numbered through."""
        shape = {"seq_len": data.seq_len, "batch_size": data.batch_size, "packing": data.packing}
        trained = PairData(*split.trained, **shape, seed=seed)
        if split.heldout is None:
            return trained, None
        return trained, PairData(*split.heldout, **shape, seed=0, shuffle=False, first=trained.n_pairs)

    def wrap(
        self,
        model: Transformer | TransformersModel,
        sources: Sequence[PairData],
        backend: SingleProcess,
        args: TrainArgs,
        cache: Path,
    ) -> PreferenceModel:
        """Return `model` with this loss; the file `cache` keeps the reference's log-probabilities of the pairs."""
        tuned = PreferenceModel(model, self)
        if self.has_reference:
            prepare(tuned, args, backend, sources[0])  # the reference computes in the dtype of the training
            with backends.use(args.attention):
                tuned.reference = reference(tuned, sources, backend, cache, args.micro_batch_size)
        return tuned


def compared(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return both rewards (n,), their difference, and how often the chosen answer has the larger one (a tie is 0.5)."""
    margin = chosen - rejected
    right = (margin.sign() + 1) / 2
    return {"reward_chosen": chosen, "reward_rejected": rejected, "margin": margin, "accuracy": right}


@dataclass(frozen=True)
class DPO(Pairwise):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): -log sigmoid of the difference
    of the rewards beta log(p / p_ref).

    `label_smoothing` e assumes that a share e of the pairs is labelled the wrong way round (cDPO, Mitchell 2023).
    `sft_weight` adds the chosen answer's loss, divided by its length (Pang et al. 2024, arXiv:2404.19733, eq. 2).
    `log_ratio_chosen` and `log_ratio_rejected` are log(p / p_ref) per token: how far the model has moved away from the
    reference on either answer.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    metrics = ("reward_chosen", "reward_rejected", "margin", "accuracy", "log_ratio_chosen", "log_ratio_rejected")
    has_reference = True

    def __call__(self, pairs: Pairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected  # log(p / p_ref), (n,)
        margin = self.beta * (chosen - rejected)
        e = self.label_smoothing
        loss = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
        loss = loss - self.sft_weight * pairs.chosen / pairs.n_chosen
        chosen, rejected = chosen.detach(), rejected.detach()
        ratios = {"log_ratio_chosen": chosen / pairs.n_chosen, "log_ratio_rejected": rejected / pairs.n_rejected}
        return loss, compared(self.beta * chosen, self.beta * rejected) | ratios


@dataclass(frozen=True)
class ORPO(Pairwise):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7), without a reference: the
    chosen answer's loss, plus beta (the paper's lambda) times -log sigmoid of the log odds ratio.

    Both terms use log-probabilities divided by the length of the answer; the rewards are beta times these.
    """

    beta: float = 0.1

    metrics = ("reward_chosen", "reward_rejected", "margin", "accuracy", "sft_loss", "log_odds_ratio")

    def __call__(self, pairs: Pairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen, rejected = pairs.chosen / pairs.n_chosen, pairs.rejected / pairs.n_rejected  # log p per token, (n,)
        ratio = log_odds(chosen) - log_odds(rejected)
        loss = -chosen - self.beta * F.logsigmoid(ratio)
        chosen, rejected = chosen.detach(), rejected.detach()
        metrics = compared(self.beta * chosen, self.beta * rejected)
        return loss, metrics | {"sft_loss": -chosen, "log_odds_ratio": ratio.detach()}


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) for log p <= 0, exact also where p is close to 0 or to 1 (log1mexp of Maechler 2012)."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)  # at p = 1 the odds would be infinite
    near_one = log_p > -math.log(2)
    far = log_p.masked_fill(near_one, -1.0)  # the branch that `where` leaves out must not make the gradient NaN
    return log_p - torch.where(near_one, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(far)))


Objective = SFT | Pairwise
OBJECTIVES: dict[str, type[Objective]] = {"sft": SFT, "dpo": DPO, "orpo": ORPO}


def make_objective(name: str, preference: PreferenceArgs) -> Objective:
    """Return the objective of that name, with those settings of `preference` that it has."""
    return OBJECTIVES[name](**{setting: getattr(preference, setting) for setting in flags.OBJECTIVES[name]})

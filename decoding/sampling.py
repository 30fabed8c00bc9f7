"""From logits to the next id: what may follow, how likely each is, and the draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro


def _flag(name: str) -> Any:
    return tyro.conf.arg(aliases=[f"--{name}"])  # `--temperature 0` beside `--sampling.temperature 0`


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen."""

    temperature: Annotated[float, _flag("temperature")] = 0.7
    """Divides the logits: below 1 is safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: Annotated[int, _flag("top_k")] = 40
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: Annotated[float, _flag("top_p")] = 1.0
    """Draw from the likeliest tokens that together hold this share of the probability (nucleus); 1: from all."""
    min_p: Annotated[float, _flag("min_p")] = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability; 0: none."""
    repetition_penalty: Annotated[float, _flag("repetition_penalty")] = 1.0
    """Above 1 makes tokens that have occurred less likely (Keskar et al. 2019, CTRL); 1: off."""
    max_new_tokens: Annotated[int, _flag("max_new_tokens")] = 256
    """The longest answer, in tokens."""
    seed: Annotated[int, _flag("seed")] = 0
    """Of the random draws; row i of a batch uses seed + i."""

    def __post_init__(self) -> None:
        """Raises ValueError on a value that makes no sense."""
        expected = {
            "temperature": (self.temperature == 0 or 0.01 <= self.temperature <= 100, "0 or from 0.01 to 100"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100 (1 is off)"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        }
        for name, (right, range_) in expected.items():
            if not right:
                raise ValueError(f"{name} should be {range_}, found {getattr(self, name)}")


def process_logits(logits: torch.Tensor, history: Sequence[Sequence[int]], params: SamplingParams) -> torch.Tensor:
    """The logits (B, V) to draw from, float32, -inf for ids that are out; `logits` itself stays as it is.

    history: the B rows' ids so far, prompt included, for the repetition penalty. The order is Hugging Face's: penalty,
    temperature, top-k, top-p, min-p; each works on what the one before has left. At temperature 0 one id is left.
    """
    logits = logits.float()
    if params.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, ids in zip(seen, history):
            row[torch.tensor(sorted(set(ids)), dtype=torch.long, device=row.device)] = True
        # A negative logit is multiplied: divided, it would become likelier.
        penalised = torch.where(logits < 0, logits * params.repetition_penalty, logits / params.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if params.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / params.temperature
    if params.top_k:
        least = logits.topk(min(params.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)  # ties with the k-th stay
    if params.top_p < 1:
        ascending, order = logits.sort(-1)
        out = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p  # the tail whose mass the nucleus can do without
        out[:, -1] = False
        logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
    if params.min_p:
        probability = logits.softmax(-1)
        weak = probability < params.min_p * probability.amax(-1, keepdim=True)
        logits = logits.masked_fill(weak, -torch.inf)
    return logits


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """softmax(logits) over the last dimension, in float64 where the device has it."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return logits.to(wide).softmax(-1)


def draw(weights: torch.Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """One id a row with probability in proportion to its weight, (B, V), not all 0: row i by inverting its distribution
    at the next number in [0, 1) of generators[i] (on the CPU), so what a row draws depends neither on its neighbours
    nor on the device."""
    mass = weights.cumsum(-1)  # (B, V); an id of weight 0 adds nothing and is never hit
    u = torch.cat([torch.rand(1, generator=g, dtype=mass.dtype) for g in generators]).to(mass.device)
    return torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True)[:, 0].tolist()

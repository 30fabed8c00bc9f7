"""From logits to the next id: what may follow, how likely each is, and the draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decoding.params import Ids, SamplingParams


def penalise(logits: torch.Tensor, history: Sequence[Ids], params: SamplingParams) -> torch.Tensor:
    """Return logits (B, V) in float32 after the repetition penalty; see `process_logits`."""
    logits = logits.float()
    if params.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, ids in zip(seen, history):
            row[torch.tensor(sorted(set(ids)), dtype=torch.long, device=row.device)] = True
        # A negative logit is multiplied: divided, it would become likelier.
        penalised = torch.where(logits < 0, logits * params.repetition_penalty, logits / params.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    return logits


def process_logits(logits: torch.Tensor, history: Sequence[Ids], params: SamplingParams) -> torch.Tensor:
    """The logits (B, V) to draw from, float32, -inf for ids that are out; `logits` itself stays as it is.

    history: the B rows' ids so far, prompt included, for the repetition penalty. The order is Hugging Face's: penalty,
    temperature, top-k, top-p, min-p; each works on what the one before has left. At temperature 0 one id is left.
    """
    logits = penalise(logits, history, params)
    if params.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    if params.temperature < 0.01:  # the quotients of the likeliest ids could be infinite: 0 is the largest
        logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / max(params.temperature, 1e-30)  # which is not 0 in float32
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

"""The loss that a scaling law expects: L(N, D) = E + A / N^alpha + B / D^beta, N parameters and D tokens.

Fitted by Hoffmann et al. 2022 (arXiv:2203.15556, "Chinchilla") and corrected by Besiroglu et al. 2024
(arXiv:2404.10102), whose fit is used. It holds for their tokenizer and their English data: the difference between two
plans carries over to other data, the loss itself does not.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Law(NamedTuple):
    """A fit of the five constants."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float


BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
HOFFMANN = Law(1.6934, 406.4, 410.7, 0.3392, 0.2849)
ERRORS = {"E": 0.03, "alpha": 0.02, "beta": 0.02}  # standard errors of Besiroglu et al., table 1
N_RANGE, D_RANGE = (44e6, 16e9), (0.3e9, 500e9)  # of the runs that were fitted
CENTRE = 1e9, 2e10  # parameters and tokens in the middle of these


def loss(n: float, d: float, law: Law = BESIROGLU) -> float:
    """Return the expected loss in nats for a token, of n parameters after d tokens."""
    return law.E + law.A / n**law.alpha + law.B / d**law.beta


def interval(n: float, d: float) -> tuple[float, float]:
    """Return an approximate 95 % interval of `loss`, from the standard errors of E, alpha and beta.

    The errors of A and alpha (of B and beta) cancel in the middle of the fitted runs, and grow with the distance from
    it: each power term is taken as exact at CENTRE. The three errors are taken as independent.
    """
    law = BESIROGLU
    terms = (
        ERRORS["E"],
        ERRORS["alpha"] * law.A / n**law.alpha * math.log(n / CENTRE[0]),
        ERRORS["beta"] * law.B / d**law.beta * math.log(d / CENTRE[1]),
    )
    half = 1.96 * math.hypot(*terms)
    return loss(n, d) - half, loss(n, d) + half


def optimal(flops: float, law: Law = BESIROGLU) -> tuple[float, float]:
    """Return the parameters and tokens with the lowest loss for a budget of operations, 6 N D."""
    both = law.alpha + law.beta
    n = (law.alpha * law.A / (law.beta * law.B)) ** (1 / both) * (flops / 6) ** (law.beta / both)
    return n, flops / 6 / n


def optimal_range(flops: float) -> tuple[float, float]:
    """Return the least and the most parameters of `optimal` for the 95 % interval of the exponent, 0.5126 +- 0.0392
    (standard error 0.02), taken as exact for the budget in the middle of the fitted runs."""
    n, _ = optimal(flops)
    factor = abs(math.log(flops / (6 * CENTRE[0] * CENTRE[1]))) * 1.96 * 0.02
    return n * math.exp(-factor), n * math.exp(factor)

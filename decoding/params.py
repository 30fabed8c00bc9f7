"""The settings of decoding: how the next token is chosen, and what ends an answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

Ids = Sequence[int]


@dataclass(frozen=True)
class Stop:
    """What ends an answer before it has `max_new_tokens`."""

    ids: Collection[int] = ()
    """ids that end the answer without being part of it"""
    ended: Callable[[Ids], bool] = lambda ids: False
    """whether the answer ends with the last of its ids so far, which is part of it (a stop string is complete)"""


NEVER = Stop()


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen."""

    temperature: float = 0.7
    """Divides the logits: below 1 is safer, above 1 more varied; 0 always takes the likeliest token."""
    top_k: int = 40
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold this share of the probability (nucleus sampling); 1: off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest token's probability; 0: off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that have occurred less likely (Keskar et al. 2019, CTRL); 1: off."""
    max_new_tokens: int = 256
    """Largest number of tokens in an answer."""
    seed: int = 0
    """Seed of the random draws; answer i of a file or a chat uses seed + i."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of its range."""
        expected = {
            "temperature": (0 <= self.temperature <= 100, "from 0 to 100"),
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


def shared_length(a: Ids, b: Ids) -> int:
    """Return the number of ids with which both texts begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

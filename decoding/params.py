"""How the next token is chosen, as flags and callers say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

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

"""LongRoPE (Ding et al. 2024, arXiv:2402.13753): a search finds a divisor for every frequency; one list of divisors for
texts within the original window and another beyond."""

import math

from rope.base import Frequencies, Rope, plain, register
from rope.keys import COUNT, FACTOR, POSITIVE, POSITIVES, WINDOW


@register(
    "longrope",
    required={"short_factor": POSITIVES, "long_factor": POSITIVES, WINDOW: COUNT},
    optional={"factor": FACTOR, "attention_factor": POSITIVE},
    not_extendable="its factors are found by a search",
)
def longrope(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """Return theta_i / short_i or theta_i / long_i, with cos and sin times sqrt(1 + ln factor / ln window).

    factor defaults to max_seq_len / window. The long list is searched for one length, so longer texts are an error.
    """
    window = scaling[WINDOW]
    lists = {name: scaling[name] for name in ("short_factor", "long_factor")}
    for name, divisors in lists.items():
        if len(divisors) != head_dim // 2:
            raise ValueError(f"longrope's {name} has {len(divisors)} numbers; head_dim {head_dim} has {head_dim // 2}")
    # the attention factor is the same for both lists
    factor = scaling.get("factor", max_seq_len / window)
    attention = scaling.get("attention_factor", math.sqrt(1 + math.log(factor) / math.log(window)))
    # inverse frequencies (D/2) within the window and beyond it
    short, long = ([f / d for f, d in zip(plain(head_dim, theta), divisors)] for divisors in lists.values())

    def frequencies(length: int) -> Frequencies:
        if length > max_seq_len:
            raise ValueError(f"longrope's factors cover texts of {max_seq_len} tokens, found a text of {length}")
        return (long if length > window else short), attention

    return Rope(frequencies, cache_rotated=False, limit=max_seq_len)

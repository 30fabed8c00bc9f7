"""LongRoPE (Ding et al. 2024, arXiv:2402.13753): a divisor for every frequency, found by search; one list for texts
within the original window and another beyond."""

import math

from rope.base import Frequencies, Rope, plain, register


@register(
    "longrope",
    required=["short_factor", "long_factor", "original_max_position_embeddings"],
    optional=["factor", "attention_factor"],
)
def longrope(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """theta_i / short_i or theta_i / long_i; cos and sin times sqrt(1 + ln factor / ln window), for both lists.

    factor: max_seq_len / window where it is not given. The long list is searched for one length: max_seq_len.
    """
    window = scaling["original_max_position_embeddings"]
    lists = {name: scaling[name] for name in ("short_factor", "long_factor")}
    for name, divisors in lists.items():
        if len(divisors) != head_dim // 2:
            raise ValueError(f"longrope's {name} has {len(divisors)} numbers; head_dim {head_dim} has {head_dim // 2}")
    factor = scaling.get("factor", max_seq_len / window)
    attention = scaling.get("attention_factor", math.sqrt(1 + math.log(factor) / math.log(window)))
    short, long = ([f / d for f, d in zip(plain(head_dim, theta), divisors)] for divisors in lists.values())

    def frequencies(length: int) -> Frequencies:
        if length > max_seq_len:
            raise ValueError(f"longrope's factors are made for texts of {max_seq_len} tokens, asked for {length}")
        return (long if length > window else short), attention

    return Rope(frequencies, cache_rotated=False, limit=max_seq_len)

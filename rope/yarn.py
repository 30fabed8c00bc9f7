"""YaRN (Peng et al. 2023, arXiv:2309.00071): frequencies that turn often within the window stay, those that turn less
than once are interpolated, and attention is sharpened.

Between the two the ramp is linear in the dimension's index, as in the authors' code and every checkpoint made with it;
the paper's formula (equation 13) is linear in the number of turns, and differs by up to half on single frequencies.
"""

import math

from rope.base import Rope, fixed, plain, register


@register(
    "yarn",
    required=["factor", "original_max_position_embeddings"],
    optional=["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"],
)
def yarn(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """theta_i / factor * ramp_i + theta_i * (1 - ramp_i); cos and sin are multiplied by the attention factor.

    beta_fast (32) and beta_slow (1): turns within the original window above which a frequency stays, and below which
    it is interpolated. truncate (True): round the ends of the ramp to whole dimensions. `finetuned`, which older files
    carry, says nothing about the formula.
    """
    factor, window = scaling["factor"], scaling["original_max_position_embeddings"]
    if max_seq_len > math.ceil(factor * window):
        raise ValueError(
            f"yarn's factor {factor} on a window of {window} covers {math.ceil(factor * window)} positions, "
            f"max_seq_len is {max_seq_len}; raise the factor to {max_seq_len / window:g}"
        )
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    if fast <= slow:
        raise ValueError(f"yarn's beta_fast must be larger than beta_slow, found {fast} and {slow}")

    def dimension(turns: float) -> float:
        """The (fractional) index of the frequency that makes so many turns within the window."""
        return head_dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    ramp = [min(max((i - low) / width, 0), 1) for i in range(head_dim // 2)]
    inv_freq = [f / factor * r + f * (1 - r) for f, r in zip(plain(head_dim, theta), ramp)]
    return fixed(inv_freq, attention_factor(scaling))


def attention_factor(scaling: dict) -> float:
    """0.1 ln(factor) + 1, or as told: by `attention_factor`, or by the ratio that mscale and mscale_all_dim make."""
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    growth = 0.1 * math.log(scaling["factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return (growth * scaling["mscale"] + 1) / (growth * scaling["mscale_all_dim"] + 1)
    return growth + 1

"""YaRN (Peng et al. 2023, arXiv:2309.00071): frequencies of many rotations within the window stay, those of less than
one rotation are interpolated, and attention is sharpened.

Between the two the ramp is linear in the dimension's index, as in the authors' code and every checkpoint made with it;
the paper's formula (equation 13) is linear in the number of rotations, and differs by up to half on some frequencies.
"""

import math

from rope.base import Rope, fixed, plain, register
from rope.keys import COUNT, FACTOR, POSITIVE, SWITCH, WINDOW

OPTIONAL = {key: POSITIVE for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")}


@register(
    "yarn", required={"factor": FACTOR, WINDOW: COUNT}, optional=OPTIONAL | {"truncate": SWITCH, "finetuned": SWITCH}
)
def yarn(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """Return theta_i / factor * ramp_i + theta_i * (1 - ramp_i), with cos and sin times the attention factor.

    beta_fast (32) and beta_slow (1): rotations within the window above which a frequency stays, and below which it is
    interpolated. truncate (True): round the ends of the ramp to whole dimensions. `finetuned`, a key of older files,
    has no effect on the formula.
    """
    factor, window = scaling["factor"], scaling[WINDOW]
    if max_seq_len > math.ceil(factor * window):
        raise ValueError(
            f"yarn's factor {factor} on a window of {window} covers {math.ceil(factor * window)} positions, "
            f"max_seq_len is {max_seq_len}; raise the factor to {max_seq_len / window:g}"
        )
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    if fast <= slow:
        raise ValueError(f"yarn's beta_fast must be larger than beta_slow, found {fast} and {slow}")

    def dimension(rotations: float) -> float:
        """Return the (fractional) index of the frequency that makes so many rotations within the window."""
        return head_dim * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    # the ramp rises from 0 at index `low` to 1 at index `high`
    low, high = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # no division by zero when the ramp is a step
    ramp = [min(max((i - low) / width, 0), 1) for i in range(head_dim // 2)]
    inv_freq = [f / factor * r + f * (1 - r) for f, r in zip(plain(head_dim, theta), ramp)]
    return fixed(inv_freq, attention_factor(scaling))


def attention_factor(scaling: dict) -> float:
    """Return the key `attention_factor`, or the ratio of the terms of mscale and mscale_all_dim when the entry has
    both, or 0.1 ln(factor) + 1."""
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    growth = 0.1 * math.log(scaling["factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        # DeepSeek's convention: the factor of all dimensions is divided out again
        return (growth * scaling["mscale"] + 1) / (growth * scaling["mscale_all_dim"] + 1)
    return growth + 1

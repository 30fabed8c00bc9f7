"""The scaling of Llama 3.1 (Grattafiori et al. 2024, arXiv:2407.21783, and Meta's code): by parts like YaRN, with a
ramp that is linear in the number of rotations within the window, and no attention factor."""

import math

from rope.base import Rope, fixed, plain, register
from rope.keys import COUNT, FACTOR, POSITIVE, WINDOW


@register(
    "llama3",
    required={"factor": FACTOR, "low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE, WINDOW: COUNT},
    defaults={"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    bounded=False,
)
def llama3(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """Return the encoding that keeps inverse frequency theta_i, divides it by `factor`, or takes a value between.

    A frequency that makes fewer than low_freq_factor rotations in the window is divided, one that makes more than
    high_freq_factor is kept; between them the weight of the kept one rises linearly from 0 to 1. Raises ValueError
    unless high_freq_factor is above low_freq_factor.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if high <= low:
        raise ValueError(f"llama3's high_freq_factor must be larger than low_freq_factor, found {high} and {low}")
    inv_freq = []
    for f in plain(head_dim, theta):
        rotations = scaling[WINDOW] * f / (2 * math.pi)
        # weight of the unscaled frequency: 0 below `low`, 1 above `high`, linear between
        weight = min(max((rotations - low) / (high - low), 0), 1)
        inv_freq.append((1 - weight) * f / scaling["factor"] + weight * f)
    return fixed(inv_freq)

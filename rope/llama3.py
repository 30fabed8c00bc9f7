"""The scaling of Llama 3.1 (Grattafiori et al. 2024, arXiv:2407.21783, and Meta's code): like YaRN's by parts, with
a ramp that is linear in the number of turns within the window, and no attention factor."""

import math

from rope.base import Rope, fixed, plain, register


@register("llama3", required=["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def llama3(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """theta_i / factor below low_freq_factor turns within the original window, theta_i above high_freq_factor turns."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if high <= low:
        raise ValueError(f"llama3's high_freq_factor must be larger than low_freq_factor, found {high} and {low}")
    inv_freq = []
    for f in plain(head_dim, theta):
        turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0), 1)
        inv_freq.append((1 - kept) * f / scaling["factor"] + kept * f)
    return fixed(inv_freq)

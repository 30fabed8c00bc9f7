"""NTK-aware scaling (bloc97 2023): a larger base, so that the slowest frequency is interpolated in full and the
fastest not at all. Those between are stretched by less than the factor: choose it larger than the window grows."""

from rope.base import Rope, fixed, ntk_theta, plain, register
from rope.keys import FACTOR


@register("ntk", required={"factor": FACTOR})
def ntk(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """Return the unscaled encoding of the base theta * factor^(D/(D-2)).

    transformers has no name for it; there the larger base is written as `rope_theta`, see `ntk_theta`.
    """
    return fixed(plain(head_dim, ntk_theta(head_dim, theta, scaling["factor"])))

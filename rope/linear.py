"""Position interpolation (Chen et al. 2023, arXiv:2306.15595): every frequency divided by the factor, which is to
divide every position by it. Hurts short texts until the model is tuned."""

from rope.base import Rope, fixed, plain, register


@register("linear", required=["factor"])
def linear(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """Inverse frequencies theta_i / factor."""
    return fixed([f / scaling["factor"] for f in plain(head_dim, theta)])

"""Position interpolation (Chen et al. 2023, arXiv:2306.15595): dividing every frequency by the factor is dividing every
position by it. Short texts get worse until the model is tuned."""

from rope.base import Rope, fixed, plain, register
from rope.keys import FACTOR


@register("linear", required={"factor": FACTOR})
def linear(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """Return the encoding of inverse frequencies theta_i / factor."""
    return fixed([f / scaling["factor"] for f in plain(head_dim, theta)])

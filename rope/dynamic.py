"""Dynamic NTK (emozilla 2023): the base grows with the text, so that texts within the window are left unchanged."""

from rope.base import Frequencies, Rope, ntk_theta, plain, register
from rope.keys import COUNT, FACTOR, WINDOW


@register("dynamic", required={"factor": FACTOR}, optional={WINDOW: COUNT}, bounded=False)
def dynamic(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """Return NTK-aware frequencies with alpha = factor * n / window - (factor - 1) for a text of n > window tokens.

    Without `original_max_position_embeddings` the window is max_seq_len, because config.json's
    `max_position_embeddings` is the window for this type. factor 1 gives alpha = n / window, the "plain" dynamic NTK.
    """
    factor, window = scaling["factor"], scaling.get(WINDOW, max_seq_len)
    ntk_theta(head_dim, theta, 1)  # raises for a head of one pair now, rather than when a text grows long

    def frequencies(length: int) -> Frequencies:
        alpha = factor * max(length, window) / window - (factor - 1)  # 1 within the window
        return plain(head_dim, ntk_theta(head_dim, theta, alpha)), 1.0

    return Rope(frequencies, cache_rotated=False)

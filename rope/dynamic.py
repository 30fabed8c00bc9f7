"""Dynamic NTK (emozilla 2023): the base grows with the text, so that texts within the window are left as they are."""

from rope.base import Frequencies, Rope, ntk_theta, plain, register


@register("dynamic", required=["factor"], optional=["original_max_position_embeddings"])
def dynamic(head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> Rope:
    """NTK-aware frequencies with alpha = factor * n / window - (factor - 1) for a text of n > window tokens.

    The window is `original_max_position_embeddings`, or max_seq_len where that is not given: config.json's
    `max_position_embeddings` is the window for this type. factor 1 gives alpha = n / window, the "plain" dynamic NTK.
    """
    factor, window = scaling["factor"], scaling.get("original_max_position_embeddings", max_seq_len)
    ntk_theta(head_dim, theta, 1)  # refuses a head too small, now and not when a text grows long

    def frequencies(length: int) -> Frequencies:
        alpha = factor * max(length, window) / window - (factor - 1)
        return plain(head_dim, ntk_theta(head_dim, theta, alpha)), 1.0

    return Rope(frequencies, cache_rotated=False)

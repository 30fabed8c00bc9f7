"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the embeddings while training, against overfitting."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def neftune(embedding: nn.Embedding, alpha: float) -> None:
    """Add uniform noise in [-1, 1] * alpha / sqrt(T d) to the output (B, T, d) of `embedding` in training mode.

    Raises ValueError when alpha is negative or not finite.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"--neftune_alpha should be 0 or more, and finite, found {alpha}")

    def add_noise(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return out
        # (B, T, d): the expected length of a row's noise does not depend on T or d
        size = alpha / math.sqrt(out.shape[-2] * out.shape[-1])
        return out + torch.empty_like(out).uniform_(-size, size)

    embedding.register_forward_hook(add_noise)

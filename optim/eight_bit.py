"""AdamW whose moments have 8 bits (Dettmers et al. 2022, arXiv:2110.02861), by bitsandbytes."""

from __future__ import annotations

import torch
from torch import nn

from optim.adamw import adamw
from optim.args import OptimArgs
from optim.groups import groups

MISSING = (
    "--optim.optimizer {} needs the package bitsandbytes, which is not installed: install it with "
    "bash setup.sh --extra bnb"
)


def adamw8bit(parameters: dict[str, list[nn.Parameter]], args: OptimArgs) -> list[torch.optim.Optimizer]:
    """Return AdamW in 8 bits for matrices, and in 32 bits for embeddings, heads and 1-D parameters.

    Embeddings keep 32 bits as in the paper, section 2.3; so do tensors of less than 4096 numbers.
    """
    in_8 = parameters | {"outer": [], "vector": []}
    in_32 = parameters | {"matrix": [], "lora_B": []}
    own = groups(in_8, args)
    return [*([make_adamw8bit(own, args)] if own else []), *adamw(in_32, args)]


def make_adamw8bit(own: list, args: OptimArgs) -> torch.optim.Optimizer:
    """Return bitsandbytes' optimizer of some param_groups or parameters. Raises ValueError where it is missing."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError(MISSING.format(args.optimizer)) from None
    return AdamW8bit(own, lr=args.lr, betas=args.betas, eps=args.eps, weight_decay=args.weight_decay)

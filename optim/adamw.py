"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on parameters sorted by role."""

from __future__ import annotations

import torch
from torch import nn

from optim.args import OptimArgs
from optim.groups import groups


def adamw(parameters: dict[str, list[nn.Parameter]], args: OptimArgs) -> list[torch.optim.Optimizer]:
    """Return one AdamW for all `parameters` (role -> parameters), or none when there are none."""
    own = groups(parameters, args)
    # one kernel for a whole group, where PyTorch has it
    fused = all(p.device.type in ("cpu", "cuda", "meta") for group in own for p in group["params"])
    return [torch.optim.AdamW(own, lr=args.lr, betas=args.betas, eps=args.eps, fused=fused)] if own else []

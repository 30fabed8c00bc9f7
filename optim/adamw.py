"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on parameters sorted by role."""

from __future__ import annotations

import torch
from torch import nn

from optim.args import OptimArgs


def adamw(parameters: dict[str, list[nn.Parameter]], args: OptimArgs) -> list[torch.optim.Optimizer]:
    """Return one AdamW for all `parameters` (role -> parameters), or none when there are none."""
    groups = [
        {"params": parameters["matrix"] + parameters["outer"], "weight_decay": args.weight_decay},
        # LoRA+: B has a learning rate of its own
        {"params": parameters["lora_B"], "weight_decay": args.weight_decay, "lr": args.lr * args.lora_lr_ratio},
        {"params": parameters["vector"], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # one kernel for a whole group, where PyTorch has it
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return [torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, eps=args.eps, fused=fused)] if groups else []

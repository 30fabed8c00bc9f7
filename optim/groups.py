"""Groups of parameters by their role, each with its learning rate and weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from optim.args import OptimArgs


def groups(parameters: dict[str, list[nn.Parameter]], args: OptimArgs) -> list[dict[str, Any]]:
    """Return param_groups over `parameters` (role -> parameters), none empty; 1-D parameters are not decayed."""
    decay, lr = args.weight_decay, args.lr
    tables = [(parameters["matrix"] + parameters["outer"], decay, 1.0)]
    if args.embed_lr_ratio != 1.0:  # else one group, as in the states that older runs have saved
        tables = [(parameters["matrix"], decay, 1.0), (parameters["outer"], decay, args.embed_lr_ratio)]
    # LoRA+: B has a learning rate of its own
    rest = [(parameters["lora_B"], decay, args.lora_lr_ratio), (parameters["vector"], 0.0, args.norm_lr_ratio)]
    return [
        {"params": params, "weight_decay": decay, "lr": lr * ratio}
        for params, decay, ratio in (*tables, *rest)
        if params
    ]

"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from optim.args import OptimArgs


def lr_factor(step: int, total_steps: int, args: OptimArgs) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total_steps`, as a share of the peak."""
    if step < args.warmup_steps:
        # the last step of the warm-up has the peak; no step has a learning rate of 0
        return (step + 1) / args.warmup_steps
    if args.schedule == "constant":
        return 1.0
    if args.schedule == "inverse_sqrt":  # Vaswani et al. 2017, equation 3
        scale = max(1, args.warmup_steps)
        return math.sqrt(scale / (step - args.warmup_steps + scale))
    # wsd stays at the peak until its last `decay_share`; the others decay from the end of the warm-up
    flat_until = total_steps * (1 - args.decay_share) if args.schedule == "wsd" else 0
    begin = max(args.warmup_steps, flat_until)
    progress = min(1.0, max(0.0, (step - begin) / max(1, total_steps - begin)))
    # 1 at the begin, 0 at the end; the floor is `min_lr_ratio`
    curve = 0.5 * (1 + math.cos(math.pi * progress)) if args.schedule == "cosine" else 1 - progress
    return args.min_lr_ratio + (1 - args.min_lr_ratio) * curve

"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from optim.args import OptimArgs

LONGEST_WARMUP = 0.1  # share of a run that is limited in time


def lr_factor(step: int, total_steps: int, args: OptimArgs, time_share: float = 0.0) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total_steps`, as a share of the peak.

    time_share: share of the run's time that has passed, for a run that may end before `total_steps`: its place in the
    schedule is that of the steps or that of the time, whichever is further, and its warm-up ends after a tenth of the
    time at the latest.
    """
    if step < args.warmup_steps and time_share < LONGEST_WARMUP:
        # the last step of the warm-up has the peak; no step has a learning rate of 0
        return max((step + 1) / args.warmup_steps, time_share / LONGEST_WARMUP)
    if args.schedule == "constant":
        return 1.0
    if args.schedule == "inverse_sqrt":  # Vaswani et al. 2017, equation 3
        scale = max(1, args.warmup_steps)
        return math.sqrt(scale / (max(0, step - args.warmup_steps) + scale))
    # wsd stays at the peak until its last `decay_share`; the others decay from the end of the warm-up
    flat_until = total_steps * (1 - args.decay_share) if args.schedule == "wsd" else 0
    begin = max(args.warmup_steps, flat_until)
    place = max(step, time_share * total_steps)  # in steps
    progress = min(1.0, max(0.0, (place - begin) / max(1, total_steps - begin)))
    # 1 at the begin, 0 at the end; the floor is `min_lr_ratio`
    curve = 0.5 * (1 + math.cos(math.pi * progress)) if args.schedule == "cosine" else 1 - progress
    return args.min_lr_ratio + (1 - args.min_lr_ratio) * curve

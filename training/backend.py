"""What the backend of a run has to know of its flags."""

from __future__ import annotations

from distributed.backend import Options
from training.args import TrainArgs


def options_of(train: TrainArgs, batch_size: int) -> Options:
    """Return the options of a run with these flags and `batch_size` rows a step, over all ranks."""
    names = ("micro_batch_size", "grad_clip", "dtype", "zero_stage", "zero_offload", "deepspeed")
    names += ("tp", "pp", "pp_schedule")
    same = {name: getattr(train, name) for name in names}
    return Options(timeout=train.rank_timeout, batch_size=batch_size, **same)

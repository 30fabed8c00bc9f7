"""Choose the backend of a run by its name."""

from __future__ import annotations

import os

from distributed.ddp import DataParallel
from distributed.single import SingleProcess
from hardware import choose_device


def make_backend(name: str, device: str, fp16: bool = False) -> SingleProcess:
    """Return the backend called `name` on `device` ("auto": cuda, else mps, else cpu), with a loss scale for `fp16`.

    Raises ValueError when it does not fit how the processes were started, or is unknown.
    """
    if name not in ("single", "ddp"):
        raise ValueError(f"--train.backend should be single or ddp, found {name!r}")
    if name == "single" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--train.backend is single, but torchrun started several processes: use ddp")
    if name == "ddp" and "RANK" not in os.environ:
        raise ValueError("--train.backend ddp is started by torchrun: torchrun --nproc_per_node 2 pretrain.py ...")
    backend = SingleProcess if name == "single" else DataParallel
    return backend(choose_device(device), fp16)


def refuse_slow_dtype(dtype: str, device: str) -> None:
    """Raise ValueError for --train.dtype fp16 on a CPU, which has no fast products in it."""
    if dtype == "fp16" and choose_device(device).type == "cpu":
        raise ValueError("--train.dtype fp16 takes minutes for a few steps on a CPU: use fp32, or auto for the fastest")

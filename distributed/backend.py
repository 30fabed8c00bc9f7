"""Choose the backend of a run by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cli.extras import need
from distributed.single import SingleProcess
from hardware import choose_device

PIPELINES = (2, 13)  # version of torch whose schedules were tried


@dataclass(frozen=True)
class Options:
    """How the steps of a run are done, for the backends that have to know."""

    timeout: float = 600.0  # seconds after which a rank that the others wait for ends the run
    batch_size: int = 0  # rows of a step over all ranks
    micro_batch_size: int = 0
    grad_clip: float = 0.0
    dtype: str = "auto"  # of activations, as --train.dtype has it
    zero_stage: str = "auto"  # of DeepSpeed, and the following two
    zero_offload: bool = False
    deepspeed: Path | None = None
    tp: int = 1  # processes that divide matrices
    pp: int = 1  # processes that divide layers
    pp_schedule: str = "1f1b"


def ddp(device: torch.device, options: Options) -> SingleProcess:
    """Return the backend of processes that hold the whole model each, or of a part of it."""
    if options.tp * options.pp > 1:
        return parallel(device, options, sharded=False)
    from distributed.ddp import DataParallel

    return DataParallel(device, options.dtype == "fp16", options.timeout)


def fsdp(device: torch.device, options: Options) -> SingleProcess:
    """Return the backend of processes that hold parts of the model."""
    if options.tp * options.pp > 1:
        return parallel(device, options, sharded=True)
    from distributed.fsdp import FullyShard  # takes seconds to import

    return FullyShard(device, False, options.timeout)


def parallel(device: torch.device, options: Options, sharded: bool) -> SingleProcess:
    """Return the backend of processes that divide the matrices or the layers of a model, too."""
    if options.pp > 1 and tuple(map(int, torch.__version__.split(".")[:2])) < PIPELINES:
        raise ValueError(
            f"--train.pp {options.pp} needs torch {PIPELINES[0]}.{PIPELINES[1]}, found {torch.__version__}"
        )
    from distributed.parallel import Parallel

    shape = {"tp": options.tp, "pp": options.pp, "schedule": options.pp_schedule}
    return Parallel(device, options.timeout, **shape, sharded=sharded)


def deepspeed(device: torch.device, options: Options) -> SingleProcess:
    """Return the backend of processes under DeepSpeed."""
    need("--train.backend deepspeed", "deepspeed", "deepspeed")
    from distributed.deepspeed import Zero

    names = ("batch_size", "micro_batch_size", "grad_clip", "dtype")
    flags = {name: getattr(options, name) for name in names} | {"stage": options.zero_stage}
    return Zero(device, options.timeout, **flags, offload=options.zero_offload, file=options.deepspeed)


SEVERAL: dict[str, Callable[[torch.device, Options], SingleProcess]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "deepspeed": deepspeed,
}
NAMES = ("single", *SEVERAL)


def make_backend(name: str, device: str, options: Options | None = None) -> SingleProcess:
    """Return the backend called `name` on `device` ("auto": cuda, else mps, else cpu).

    Raises ValueError when it does not fit how the processes were started, or is unknown.
    """
    options = options or Options()
    if name not in NAMES:
        raise ValueError(f"--train.backend should be {' or '.join(NAMES)}, found {name!r}")
    if name == "single":
        if n_processes() > 1:
            raise ValueError(
                "--train.backend is single, but torchrun started several processes: use ddp, fsdp or deepspeed"
            )
        return SingleProcess(choose_device(device), options.dtype == "fp16")
    if "RANK" not in os.environ:
        raise ValueError(f"--train.backend {name} is started by torchrun: torchrun --nproc_per_node 2 pretrain.py ...")
    return SEVERAL[name](choose_device(device), options)


def n_processes() -> int:
    """Return the number of processes that the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_slow_dtype(dtype: str, device: str) -> None:
    """Raise ValueError for --train.dtype fp16 on a CPU, which has no fast products in it."""
    if dtype == "fp16" and choose_device(device).type == "cpu":
        raise ValueError("--train.dtype fp16 takes minutes for a few steps on a CPU: use fp32, or auto for the fastest")

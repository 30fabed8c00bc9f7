"""The choice of the backend that a run asks for."""

from __future__ import annotations

import os

import torch

from distributed.ddp import DataParallel
from distributed.single import SingleProcess
from hardware import choose_device


def make_backend(name: str, device: str, fp16: bool = False) -> SingleProcess:
    """The backend called `name` on `device` ("auto": cuda, else mps, else cpu); ValueError if it cannot run here."""
    device = str(choose_device(device))
    if name == "single":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "torchrun started several processes, and --train.backend is single; say --train.backend ddp"
            )
        return SingleProcess(torch.device(device), fp16)
    if name == "ddp":
        if "RANK" not in os.environ:
            raise ValueError("--train.backend ddp is started by torchrun: torchrun --nproc_per_node 2 pretrain.py ...")
        return DataParallel(device, fp16)
    raise ValueError(f"there is no backend {name!r}; choose single or ddp")

"""The flags of the training loop, `--train.*`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from attention import Choice


@dataclass(frozen=True)
class TrainArgs:
    """The loop."""

    max_steps: int = 0
    """optimizer steps; 0: as many as `epochs` takes"""
    epochs: float = 1.0
    """passes over the data, when max_steps is 0"""
    micro_batch_size: int = 0
    """rows a process takes through the model at once (gradients are accumulated); 0: all of its rows"""
    grad_clip: float = 1.0
    """clip the gradient norm to this; 0: never"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of activations and matrix products (parameters stay fp32); auto: bf16 where the hardware has it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on where a C++ compiler or a GPU is found"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: a third more work, far less memory"""
    attention: Choice = "auto"
    """what computes attention; auto: the fastest that can do it here"""
    s2_group: int = 0
    """attend in shifted groups of so many tokens (LongLoRA's S2-Attn) while training; 0: in full"""
    s2_min_len: int = 0
    """and only over rows of this many tokens or more"""
    float32_matmul: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision; high is TF32 on a GPU"""
    backend: Literal["single", "ddp"] = "single"
    """single: one process; ddp: several, started with torchrun"""
    device: str = "auto"
    """auto: cuda, else mps, else cpu"""
    seed: int = 0
    """of initialisation and of the order of the data"""
    log_interval: int = 20
    """steps between lines of the log"""
    eval_interval: float = 250
    """steps between evaluations on held-out data; below 1: a share of an epoch; 0: only at the end"""
    eval_batches: int = 20
    """batches of an evaluation on the way; the last one takes all, and so does each where the metric is of tasks; 0:
    always all"""
    save_interval: float = 500
    """steps between checkpoints, or a share of an epoch; the best and the last are saved besides"""
    keep: int = 3
    """checkpoints to keep (the best and the last always stay)"""
    patience: int = 0
    """stop after this many evaluations without a new best; 0: never"""
    metric: str = "loss"
    """the held-out measure that makes the best: loss (each token counts alike), bits_per_byte; of several tasks also
    task_mean (the mean of their losses: each task counts alike), or loss/NAME of one"""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the last checkpoint in the run directory; never: start anew, replacing it"""

    def __post_init__(self) -> None:
        """Raises ValueError on a number below 0 (as a norm to clip to, it would turn all gradients around), or none."""
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise ValueError(f"{name} should be 0 or more, and finite, found {value}")
        if not self.max_steps and not self.epochs:
            raise ValueError("max_steps and epochs are both 0: there is nothing to train")
        for name in ("eval_interval", "save_interval"):
            if (value := getattr(self, name)) > 1 and value != int(value):
                raise ValueError(f"{name} should be whole steps, or a share of an epoch below 1, found {value}")
        if self.s2_group % 2:
            raise ValueError(
                "--train.s2_group should be an even number of tokens, since groups are shifted by half of one, "
                f"found {self.s2_group}"
            )

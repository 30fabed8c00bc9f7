"""The flags of the training loop, `--train.*`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from attention import Choice
from cli.extras import install_command
from cli.flags import ABOVE_0, Needs, Wanted
from optim.args import GALORE, WITH_BETAS, WITH_EPS

LOGGERS = ("tensorboard", "wandb", "swanlab")  # keys of training.loggers.LOGGERS; here for the parser, without torch


@dataclass(frozen=True)
class TrainArgs:
    """Training loop."""

    max_steps: Annotated[int, (0, 1000000000000)] = 0
    """number of optimizer steps; 0: as many as `epochs` takes"""
    epochs: Annotated[float, (0, 1000000)] = 1.0
    """passes over the data, when max_steps is 0"""
    max_minutes: Annotated[float, (0, 1000000)] = 0.0
    """limit of the run in minutes. Where the steps would take longer, the learning rate follows the time, so that the
    warm-up, the decay and the end come in time on a machine of any speed; 0: no limit"""
    micro_batch_size: Annotated[int, (0, 10000000)] = 0
    """rows that a process runs through the model at once (gradients are accumulated over a step); 0: all of its rows"""
    z_loss: Annotated[float, (0, 1)] = 0.0
    """add this times log(Z)² of each target to what is minimized, Z the sum of the exponentials of its logits: keeps
    logits from drifting (PaLM: 1e-4). The logged losses leave it out"""
    grad_clip: Annotated[float, (0, 1e12)] = 1.0
    """largest gradient norm; larger gradients are scaled down to it; 0: no limit"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """dtype of activations and matrix products (parameters stay fp32); auto: bf16 where the hardware has it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on where it can run (it needs a C++ compiler, on a GPU Triton and a C compiler) and, on a
    CPU, where the whole run is long enough to win back the time that it takes"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: a third more work, far less memory"""
    attention: Choice = "auto"
    """attention backend; auto: the fastest one that can run here"""
    s2_group: Annotated[int, (0, 2147483647)] = 0
    """attend in shifted groups of this many tokens while training (LongLoRA's S2-Attn); 0: full attention"""
    s2_min_len: int = 0
    """use s2_group only for rows of at least this many tokens"""
    float32_matmul: Literal["auto", "highest", "high", "medium"] = "auto"
    """torch.set_float32_matmul_precision; high is TF32 on a GPU. auto: on a CPU the fastest way whose products are as
    exact as float32, measured once on a machine; elsewhere highest"""
    backend: Literal["single", "ddp", "fsdp", "deepspeed"] = "single"
    """single: one process; the others: several, started with torchrun. ddp: each holds the whole model; fsdp: each
    holds a part of the weights, gradients and moments (FSDP2); deepspeed: ZeRO, see zero_stage"""
    tp: Annotated[int, (1, 65536)] = 1
    """processes that divide the matrices, the vocabulary and, between the blocks, the tokens of a row (tensor and
    sequence parallel), with backend ddp or fsdp; has to divide heads, key/value heads, vocabulary and rows"""
    pp: Annotated[int, (1, 65536)] = 1
    """stages that divide the layers (pipeline parallel), with backend ddp or fsdp, each on one process, or on `tp` of
    them; micro_batch_size has to make at least as many micro-batches"""
    pp_schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """order of the micro-batches in the stages. gpipe: all forward, then all backward; 1f1b: backward as soon as one
    can be, with less memory"""
    zero_stage: Literal["auto", "0", "1", "2", "3"] = "auto"
    """what DeepSpeed divides over the processes. 0: nothing, 1: the moments, 2: also the gradients, 3: also the
    weights; auto: the stage in the file of --train.deepspeed, else 2"""
    zero_offload: bool = False
    """keep the moments in the memory of the CPU, and update there (DeepSpeed's optimizer offload)"""
    deepspeed: Path | None = None
    """JSON file with more settings of DeepSpeed; what contradicts another flag is refused with its name"""
    rank_timeout: Annotated[float, (1, 1000000)] = 600.0
    """seconds to wait for a process that does not answer; then the run ends and names it. Saving has to take less"""
    device: str = "auto"
    """cpu, cuda or mps; auto: cuda, else mps, else cpu"""
    seed: Annotated[int, (0, 9223372036854775807)] = 0
    """random seed of the initial weights and of the order of the data"""
    log_interval: int = 20
    """steps between lines of the log"""
    eval_interval: float = 250
    """steps between evaluations on held-out data; below 1: a share of an epoch; 0: only at the end"""
    eval_batches: int = 20
    """number of held-out batches of each evaluation; 0: all. The last evaluation always takes all, and so does every
    one with `metric` task_mean or loss/NAME"""
    save_interval: float = 500
    """steps between checkpoints; below 1: a share of an epoch; 0: only the best and the last, which are always saved"""
    save: Literal["whole", "sharded"] = "whole"
    """whole: the first process gathers and writes a checkpoint; sharded: every process copies its own part of weights
    and moments and writes it while steps go on (torch.distributed.checkpoint). All scripts read both, and any number of
    processes goes on from either; convert.py makes a plain Hugging Face directory of a sharded one"""
    log_norms: Annotated[int, (0, 1000000000)] = 0
    """steps between rows of the log with the gradient norm and the size of the activations of each layer; 0: none"""
    rollbacks: Annotated[int, (0, 1000)] = 2
    """times that the run goes back to its last checkpoint, with half the learning rate, after 20 steps in a row without
    a finite gradient, before it ends"""
    keep: Annotated[int, (0, 1000000)] = 3
    """number of checkpoints to keep (the best and the last always stay)"""
    patience: Annotated[int, (0, 1000000000)] = 0
    """stop after this many evaluations without a new best; 0: never"""
    metric: str = "loss"
    """held-out metric that decides which checkpoint is the best. loss: every token counts the same; bits_per_byte; with
    several tasks also task_mean: every task counts the same, or loss/NAME: the loss of one task"""
    loggers: tuple[Literal[LOGGERS], ...] = ("tensorboard",)  # type: ignore[valid-type]
    """where numbers go beside metrics.jsonl: tensorboard, wandb (Weights & Biases), swanlab; WANDB_MODE=offline and
    SWANLAB_MODE=offline need no network. One that fails does not stop the run"""
    prompts: tuple[str, ...] = ()
    """texts that the model continues (or questions that it answers) at every evaluation, for samples.jsonl in the run
    directory; default: the first ones of the held-out data, or of the training data where nothing is held out"""
    sample_tokens: Annotated[int, (0, 1000000)] = 48
    """largest number of tokens of such a sample; 0: no samples"""
    sample_minutes: Annotated[float, (0, 1000000)] = 0.0
    """minutes between samples that are shown on the way, of one prompt after the other; 0: none is shown"""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the last checkpoint in the run directory; never: start anew and replace it"""

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are negative or not finite, and for a run of no steps."""
        for name, value in vars(self).items():  # a negative norm to clip to would reverse all gradients
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise ValueError(f"--train.{name} should be 0 or more, and finite, found {value}")
        if not self.max_steps and not self.epochs:
            raise ValueError("--train.max_steps and --train.epochs are both 0: there is nothing to train; set one")
        for name in ("eval_interval", "save_interval"):
            if (value := getattr(self, name)) > 1 and value != int(value):
                raise ValueError(
                    f"--train.{name} should be a whole number of steps, a share of an epoch between 0 and 1, or 0, "
                    f"found {value}"
                )
        for name in self.loggers:
            if name != "tensorboard" and find_spec(name) is None:
                raise ValueError(
                    f"--train.loggers {name} needs {name}, which is not installed: {install_command(name)}"
                )
        if self.s2_group % 2:
            raise ValueError(
                "--train.s2_group should be an even number of tokens, since groups are shifted by half of one, "
                f"found {self.s2_group}"
            )

    def steps(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the whole run."""
        return self.max_steps or max(1, math.ceil(self.epochs * steps_per_epoch))


ABOVE_1 = Wanted(lambda value, default: value > 1, "above 1")
SEVERAL = ("ddp", "fsdp", "deepspeed")  # backends of several processes
SHARDED = ("fsdp", "deepspeed")  # backends whose processes hold parts of the model
NEEDS = (  # flags of pretrain.py and fine_tuning.py that do something only beside others
    Needs("optim.muon_lr", "optim.optimizer", ("muon",), "the others have one rate, --optim.lr; remove it"),
    Needs("optim.momentum", "optim.optimizer", ("muon",), "the others have --optim.betas or none; remove it"),
    Needs("optim.betas", "optim.optimizer", WITH_BETAS, "Adafactor has no such rates; remove it"),
    Needs("optim.eps", "optim.optimizer", WITH_EPS, "the others have no such flag; remove it"),
    Needs("optim.galore_*", "optim.optimizer", GALORE, "the others have no subspace; remove it"),
    Needs("optim.decay_share", "optim.schedule", ("wsd",), "the other schedules have no such part; remove it"),
    Needs("optim.min_lr_ratio", "optim.schedule", ("wsd", "cosine", "linear"), "the rate never falls; remove it"),
    Needs("train.epochs", "train.max_steps", (0,), "that many steps are trained, whatever the epochs; keep one"),
    Needs("train.s2_min_len", "train.s2_group", ABOVE_0, "without groups, attention is full for all rows; remove it"),
    Needs("train.log_norms", "train.backend", ("single", "ddp"), "parameters are divided over ranks there; remove it"),
    Needs(
        "train.rank_timeout", "train.backend", ("ddp", "fsdp", "deepspeed"), "one process waits for no other; remove it"
    ),
    *(
        Needs(f"train.{name}", "train.backend", ("deepspeed",), "the others do not read it; remove it")
        for name in ("zero_stage", "zero_offload", "deepspeed")
    ),
    Needs(
        "train.backend",
        "train.dtype",
        ("auto", "fp32", "bf16"),
        "its loss scale needs whole gradients; use bf16",
        is_set=SHARDED.__contains__,
    ),
    *(
        Needs(
            "train.backend",
            "optim.optimizer",
            able,
            "the others need whole matrices; use one of these",
            {name}.__contains__,
        )
        for name, able in {"fsdp": ("muon", "adamw", "lion"), "deepspeed": ("adamw", "muon")}.items()
    ),
    *(
        Needs(f"train.{name}", other, values, why)
        for name in ("tp", "pp")
        for other, values, why in (
            ("train.backend", ("ddp", "fsdp"), "these say how the data are divided besides; choose one"),
            ("optim.optimizer", ("muon", "adamw", "lion"), "the others need whole matrices; use one of these"),
            ("train.dtype", ("auto", "fp32", "bf16"), "its loss scale needs whole gradients; use bf16"),
            ("train.compile", ("auto", "off"), "a divided model is not compiled; remove it"),
            ("train.log_norms", (0,), "a process has some layers, or parts of all; remove it"),
            ("train.s2_group", (0,), "half of all heads are shifted, and a process has some of them; remove it"),
        )
    ),
    Needs("train.pp_schedule", "train.pp", ABOVE_1, "one stage has no schedule; remove it"),
    Needs("train.patience", "train.eval_interval", ABOVE_0, "it counts evaluations on the way; set an interval"),
    Needs("train.sample_minutes", "train.sample_tokens", ABOVE_0, "nothing would be shown; remove it"),
    Needs("train.prompts", "train.sample_tokens", ABOVE_0, "nothing would be written after them; remove it"),
    Needs("train.eval_batches", "train.eval_interval", ABOVE_0, "the evaluation at the end takes all; remove it"),
)

"""Commands and launch files: how a strategy of a plan is run by this repository."""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from typing import Any

from cli.flags import check_flags
from distributed.split import check_rows, check_shape
from planning.cluster import Cluster, Prediction, Strategy
from planning.memory import Step
from planning.shapes import Recipe, Source
from planning.tables import count, duration, gib
from training.args import NEEDS

BACKENDS = {"DDP": "ddp", "FSDP2": "fsdp", "ZeRO-1": "deepspeed", "ZeRO-2": "deepspeed", "ZeRO-3": "deepspeed"}
DIVIDING = ("train.backend", "train.tp", "train.pp")  # the flags that say how a step is divided
PORT = 29500


def backend_of(strategy: Strategy) -> str:
    """Return the --train.backend of a strategy; without data ranks, 3D has nothing that FSDP2 could divide."""
    return BACKENDS.get(strategy.name, "fsdp" if strategy.data > 1 else "ddp")


def made_by(args: Any) -> str:
    """Return the command of a plan: plan.py with the flags without a group that are not as by default."""
    words = ["python plan.py"]
    for each in dataclasses.fields(args):
        value = getattr(args, each.name)
        if each.name not in ("shape", "json", "picture") and value != each.default:
            words.append(f"--{each.name} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}")
    return " ".join(words)


def own_flags(source: Source, dtype: str, optimizer: str) -> str:
    """Return the flags of dtype and optimizer where they are not those of the preset, or else of the scripts."""
    recipe = source.recipe or Recipe()
    flags = [f"--optim.optimizer {optimizer}"] * (optimizer != recipe.optim.optimizer)
    return " ".join([*flags, *[f"--train.dtype {dtype}"] * (dtype not in ("auto", recipe.train.dtype))])


@dataclass(frozen=True)
class Launch:
    """One strategy on one cluster, as a command."""

    source: Source
    where: Cluster
    step: Step
    found: Prediction

    def refusal(self) -> str | None:
        """Return why this repository does not run it, as the scripts would say; None where it does."""
        strategy, where = self.found.strategy, self.where
        recipe = self.source.recipe or Recipe()
        sizes = {"backend": backend_of(strategy), "tp": strategy.tensor, "pp": strategy.pipeline}
        optim = dataclasses.replace(recipe.optim, optimizer=self.step.optimizer)
        asked = dataclasses.replace(recipe, optim=optim, train=dataclasses.replace(recipe.train, **sizes))
        try:
            check_flags(asked, [row for row in NEEDS if row.flag in DIVIDING])
            if strategy.name.startswith("ZeRO") and self.step.optimizer == "muon":
                raise ValueError("Muon needs whole matrices, and DeepSpeed's parts are flat: use --optimizer adamw")
            if strategy.name == "3D":
                check_shape(self.source.args, strategy.tensor, strategy.pipeline)
                rows = where.batch_size // strategy.data
                check_rows(strategy.tensor, strategy.pipeline, where.seq_len, False, rows, self.found.rows)
        except ValueError as error:
            return str(error)
        return None

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return -(-self.where.gpus // self.where.per_node)

    @property
    def per_node(self) -> int:
        """GPUs of each machine."""
        return min(self.where.per_node, self.where.gpus)

    def script(self) -> list[str]:
        """Return the script and its flags, each with its values."""
        strategy = self.found.strategy
        flags = [f"pretrain.py {self.source.command}", f"--train.backend {backend_of(strategy)}"]
        sizes = {"tp": strategy.tensor, "pp": strategy.pipeline}
        flags += [f"--train.{name} {size}" for name, size in sizes.items() if size > 1]
        if strategy.name.startswith("ZeRO"):
            flags.append(f"--train.zero_stage {strategy.name[-1]}" + " --train.zero_offload True" * strategy.offload)
        flags += [self.source.flags] if self.source.flags else []
        flags.append(f"--data.seq_len {self.where.seq_len} --data.batch_size {self.where.batch_size}")
        again = " --train.gradient_checkpointing True" * self.found.checkpointing
        return [*flags, f"--train.micro_batch_size {self.found.rows}{again}"]

    def command(self) -> str:
        """Return the command for one node, or for each of several nodes."""
        several = f"--nnodes {self.nodes} --rdzv_backend c10d --rdzv_endpoint HOST:{PORT} " if self.nodes > 1 else ""
        return f"torchrun {several}--nproc_per_node {self.per_node} {' '.join(self.script())}"

    def file(self, made_by: str, tokens: float, slurm: bool) -> str:
        """Return the text of a launch file: for SLURM's sbatch, or for bash on each node.

        made_by: the command that made it; tokens: of the whole training
        """
        steps = math.ceil(tokens / (self.where.batch_size * self.where.seq_len))
        named = self.source.name.rpartition("/")[2].removesuffix(".yaml")
        places = f'--data.dir "${{DATA:-data/mine}}" --out "${{OUT:-out/{named}}}"'
        script = [*self.script(), f"--train.max_steps {steps}", places]
        head = ["#!/usr/bin/env bash", *self.comments(made_by, tokens, slurm)]
        nodes, several = f"--nnodes {self.nodes}", self.nodes > 1
        if slurm:
            head += [f"#SBATCH --job-name={named}", f"#SBATCH --nodes={self.nodes}", "#SBATCH --ntasks-per-node=1"]
            head += [f"#SBATCH --gpus-per-node={self.per_node}", "#SBATCH --exclusive", "set -euo pipefail", ""]
            head += ['nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")', "first=${nodes%%$'\\n'*}", ""]
            start = (
                f'srun torchrun {nodes} --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:{PORT}"'
            )
        else:
            head += ["set -euo pipefail", ""]
            start = "torchrun"
            if several:
                head += [f': "${{FIRST:?name or address of the first of the {self.nodes} nodes}}"', ""]
                start += f' {nodes} --rdzv_backend c10d --rdzv_endpoint "$FIRST:{PORT}"'
        lines = [f"{start} --nproc_per_node {self.per_node}", *script]
        return "\n".join([*head, " \\\n  ".join(lines)]) + "\n"

    def comments(self, made_by: str, tokens: float, slurm: bool) -> list[str]:
        """Return what a reader of the file has to know, as comments."""
        found = self.found
        seconds = tokens / found.tokens_per_second
        each_node = "" if self.nodes == 1 or slurm else " Start it on every node, with the same FIRST."
        return [
            f"# Made by: {made_by}",
            f"# Predicted by formulas, not measured: {found.strategy.label} takes {gib(found.total)} of each "
            f"{self.where.device.name}, {found.seconds:.3g} s a step,",
            f"# {count(found.tokens_per_second)} tokens/s; {count(tokens)} tokens take {duration(seconds)}.",
            "# DATA is a directory of data_process.py with the model's tokenizer. After a stop the same file goes on",
            f"# from the newest checkpoint.{each_node}",
        ]


def sorted_out(
    source: Source, where: Cluster, step: Step, found: list[Prediction]
) -> tuple[list[Launch], dict[str, list[str]]]:
    """Return the strategies that this repository runs, and the labels of the others by the reason why not."""
    able, refused = [], {}
    for each in (Launch(source, where, step, one) for one in found):
        if why := each.refusal():
            refused.setdefault(why, []).append(each.found.strategy.label)
        else:
            able.append(each)
    return able, refused

"""The configuration that DeepSpeed gets: ours, and from a JSON file of the user what does not contradict it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files import read_json_object

AUTO = "auto"
# keys of a JSON file that would change what is trained, or do what another flag does -> the flag, or the reason
REFUSED = {
    "optimizer": "the optimizer is that of --optim.optimizer and its rates",
    "scheduler": "the schedule is that of --optim.schedule; a second one would change the rate behind it",
    "amp": "the dtype is that of --train.dtype",
    "elasticity": "a run goes on with any number of processes by itself",
    "autotuning": "bench/plan.py and plan.py measure and plan; DeepSpeed's search would start other runs",
    "curriculum_learning": "it would change the batches, which are a function of the seed and the step",
    "data_efficiency": "it would change the batches, which are a function of the seed and the step",
    "progressive_layer_drop": "it would change the model",
    "compression_training": "it would change the weights; quantize.py compresses a model",
    "checkpoint": "checkpoints are ours, and the same for every --train.backend",
    "pipeline": "there is no pipeline in this backend",
    "tensor_parallel": "there is no tensor parallelism in this backend",
    "sparse_attention": "attention is that of --train.attention",
    "activation_checkpointing": "use --train.gradient_checkpointing",
}
BUCKET = 50_000_000  # numbers that are exchanged at once; DeepSpeed's own 500 million take 2 GB


@dataclass(frozen=True)
class Wanted:
    """What the flags of a run say about its steps."""

    world: int
    batch_size: int  # rows of a step over all ranks
    micro_batch_size: int  # rows of a rank at once; 0: all of them
    grad_clip: float
    dtype: str  # --train.dtype
    stage: str  # --train.zero_stage
    offload: bool  # --train.zero_offload
    file: Path | None  # --train.deepspeed


def make_config(wanted: Wanted) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Raises ValueError that names the key of the user's file, and the flag that it contradicts.
    """
    users = {} if wanted.file is None else read_json_object(wanted.file)
    where = str(wanted.file)
    for key, why in REFUSED.items():
        if users.get(key) not in (None, False, {}) and not is_off(users[key]):
            raise ValueError(f"{where}: {key} contradicts the flags: {why}; remove it")
    check_dtype(users, wanted, where)
    check_sizes(users, wanted, where)
    zero = make_zero(section(users, "zero_optimization", where), wanted, where)
    passed = {key: value for key, value in users.items() if key not in REFUSED and key not in OURS}
    return passed | {
        # a rank calls the engine once for each micro-batch and says itself which one is the last
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": wanted.grad_clip,  # always: DeepSpeed clips at 1.0 where the key is missing
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is ours, on the CPU as well
        "steps_per_print": users.get("steps_per_print") or 10**12,  # a large number: never
    }


OURS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "zero_force_ds_cpu_optimizer", "steps_per_print", "bf16", "fp16", "torch_autocast"),
)


def is_off(value: Any) -> bool:
    """Return whether a section of the user's file says that it is not enabled."""
    return isinstance(value, dict) and value.get("enabled") is False


def section(users: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return an object in the user's file; {} where it has none."""
    value = users.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} should be an object, found {value!r:.100}")
    return value


def check_dtype(users: dict[str, Any], wanted: Wanted, where: str) -> None:
    """Raise ValueError for a dtype in the user's file that is not that of the flags."""
    for key in ("bf16", "fp16", "torch_autocast"):
        on = section(users, key, where).get("enabled", False)
        if on in (False, AUTO):
            continue
        dtype = {"bf16": "bf16", "fp16": "fp16"}.get(key) or str(users[key].get("dtype", "bfloat16"))
        if dtype not in ("bf16", "bfloat16") or wanted.dtype not in ("bf16", AUTO):
            raise ValueError(
                f"{where}: {key} contradicts --train.dtype {wanted.dtype}: activations are in the dtype of the flag "
                "(auto, fp32 or bf16) and parameters in fp32; remove it, or set its enabled to auto"
            )


def check_sizes(users: dict[str, Any], wanted: Wanted, where: str) -> None:
    """Raise ValueError for a number in the user's file that is not that of the flags."""
    rows = max(1, wanted.batch_size // wanted.world)  # the batches refuse a number that does not divide
    micro = min(wanted.micro_batch_size or rows, rows)
    numbers = {
        "train_batch_size": (wanted.batch_size, "--data.batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "--train.micro_batch_size"),
        "gradient_accumulation_steps": (-(-rows // micro), "--data.batch_size and --train.micro_batch_size"),
        "gradient_clipping": (wanted.grad_clip, "--train.grad_clip"),
    }
    for key, (ours, flag) in numbers.items():
        if (found := users.get(key, AUTO)) not in (AUTO, ours):
            raise ValueError(f"{where}: {key} {found} contradicts {flag}, which makes it {ours}: write {ours} or auto")


def make_zero(users: dict[str, Any], wanted: Wanted, where: str) -> dict[str, Any]:
    """Return the section zero_optimization."""
    theirs = users.get("stage", AUTO)
    if AUTO not in (wanted.stage, theirs) and str(theirs) != wanted.stage:
        raise ValueError(f"{where}: zero_optimization.stage {theirs} contradicts --train.zero_stage {wanted.stage}")
    stage = next((str(each) for each in (wanted.stage, theirs) if each != AUTO), "2")
    if stage not in ("0", "1", "2", "3"):
        raise ValueError(f"{where}: zero_optimization.stage should be 0, 1, 2 or 3, found {theirs}")
    offload = section(users, "offload_optimizer", where).get("device", "none")
    if offload not in ("none", "cpu", AUTO) or section(users, "offload_param", where).get("device", "none") != "none":
        raise ValueError(f"{where}: only offload_optimizer to the device cpu is supported, not nvme and not parameters")
    zero = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET} | users | {"stage": int(stage)}
    zero = {key: value for key, value in zero.items() if value != AUTO and not key.startswith("offload_")}
    if wanted.offload or offload == "cpu":
        if stage == "0":
            raise ValueError("--train.zero_offload needs --train.zero_stage 1, 2 or 3: at 0 no state is divided")
        zero["offload_optimizer"] = {"device": "cpu"} | section(users, "offload_optimizer", where)
    return zero

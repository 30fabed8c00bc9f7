"""The configuration that DeepSpeed gets: ours, and from a JSON file of the user what does not contradict it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.schema import nearest
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
# keys that DeepSpeed reads and that change no number. It ignores an unknown key, and others would change what is
# trained: `bfloat16` is its own bf16 mode, `gradient_allreduce_op` may add gradients instead of averaging them
PASSED = (
    *("wall_clock_breakdown", "memory_breakdown", "dump_state", "timers", "log_level", "flops_profiler"),
    *("comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "aio", "disable_python_gc", "disable_allgather"),
    *("zero_allow_untested_optimizer",),
)
# the same in the section zero_optimization: numbers, and switches
ZERO_PASSED = (
    *("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions"),
    *("reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "round_robin_gradients", "sub_group_size"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold"),
    *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "memory_efficient_linear"),
    *("stage3_gather_16bit_weights_on_model_save", "elastic_checkpoint", "ignore_unused_parameters"),
    *("load_from_fp32_weights", "log_trace_cache_warnings"),
)
NEVER = 10**12  # steps between two lines of DeepSpeed
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
        if not is_off(users.get(key)):
            raise ValueError(f"{where}: {key} contradicts the flags: {why}; remove it")
    check_names(users, (*OURS, *PASSED), [*REFUSED], where)
    check_dtype(users, wanted, where)
    check_sizes(users, wanted, where)
    zero = make_zero(section(users, "zero_optimization", where), wanted, where)
    passed = {key: users[key] for key in PASSED if users.get(key, AUTO) != AUTO}
    steps = NEVER if users.get("steps_per_print") in (None, 0, AUTO) else users["steps_per_print"]
    if type(steps) is not int or steps < 1:
        raise ValueError(f"{where}: steps_per_print should be a number of steps, found {steps!r:.100}")
    return passed | {
        # a rank calls the engine once for each micro-batch and says itself which one is the last
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": wanted.grad_clip,  # always: DeepSpeed clips at 1.0 where the key is missing
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is ours, on the CPU as well
        "steps_per_print": steps,
    }


OURS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "zero_force_ds_cpu_optimizer", "steps_per_print", "bf16", "fp16", "torch_autocast"),
)


def is_off(value: Any) -> bool:
    """Return whether a value in the user's file, or a section of it, turns nothing on."""
    return value in (None, False, {}, AUTO) or (isinstance(value, dict) and value.get("enabled") is False)


def check_names(users: dict[str, Any], known: Sequence[str], off: Sequence[str], where: str) -> None:
    """Raise ValueError for a setting that is neither `known`, nor one of `off`, nor turned off."""
    for key, value in users.items():
        if key not in known and key not in off and not is_off(value):
            raise ValueError(
                f"{where}: {key} is unknown, or would change the numbers of a run: remove it{nearest(key, known)}"
            )


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
    offload = section(users, "offload_optimizer", where).get("device", AUTO)
    if wanted.offload and offload == "none":
        raise ValueError(f"{where}: offload_optimizer.device none contradicts --train.zero_offload True: remove one")
    if offload not in ("none", "cpu", AUTO) or section(users, "offload_param", where).get("device", "none") != "none":
        raise ValueError(f"{where}: only offload_optimizer to the device cpu is supported, not nvme and not parameters")
    check_names(users, ("stage", "offload_optimizer", *ZERO_PASSED), ["offload_param"], f"{where}: zero_optimization")
    passed = {key: users[key] for key in ZERO_PASSED if users.get(key) not in (None, AUTO)}
    for key, value in passed.items():
        least = 1 if key.endswith("bucket_size") else 0
        if not (isinstance(value, (int, float)) and value >= least):
            what = f"should be a number of at least {least}, or true or false"
            raise ValueError(f"{where}: zero_optimization.{key} {what}, found {value!r:.100}")
    zero = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET} | passed | {"stage": int(stage)}
    if wanted.offload or offload == "cpu":
        if stage == "0":
            raise ValueError("--train.zero_offload needs --train.zero_stage 1, 2 or 3: at 0 no state is divided")
        more = {key: value for key, value in section(users, "offload_optimizer", where).items() if value != AUTO}
        zero["offload_optimizer"] = more | {"device": "cpu"}
    return zero

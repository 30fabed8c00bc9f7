"""What a user's JSON for DeepSpeed may say beside the flags, and what DeepSpeed gets."""

import json

import pytest

from distributed.deepspeed_config import Wanted, make_config

FLAGS = {"world": 2, "batch_size": 8, "micro_batch_size": 2, "grad_clip": 0.5, "dtype": "bf16", "stage": "auto"}


def config(tmp_path, users: dict | None = None, **changes) -> dict:
    file = None
    if users is not None:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(users))
    return make_config(Wanted(**FLAGS | {"offload": False, "file": file} | changes))


def test_without_a_file(tmp_path):
    found = config(tmp_path, grad_clip=0.0)
    assert found["gradient_clipping"] == 0.0  # written: where it is missing, DeepSpeed clips at 1.0
    assert found["zero_optimization"]["stage"] == 2
    assert (found["gradient_accumulation_steps"], found["train_micro_batch_size_per_gpu"]) == (1, 1)
    assert not {"optimizer", "scheduler", "bf16", "fp16"} & found.keys()


def test_what_agrees_is_taken(tmp_path):
    users = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5, "bf16": {"enabled": True}, "fp16": {"enabled": False}, "steps_per_print": 3,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10, "reduce_bucket_size": "auto"},
        "wall_clock_breakdown": False, "curriculum_learning": {"enabled": False},
    }  # fmt: skip
    found = config(tmp_path, users)
    zero = found["zero_optimization"]
    assert (zero["stage"], zero["stage3_param_persistence_threshold"]) == (3, 10)
    assert "reduce_bucket_size" not in zero or isinstance(zero["reduce_bucket_size"], int)
    assert (found["steps_per_print"], found["wall_clock_breakdown"]) == (3, False)
    assert "bf16" not in found  # the model computes in it itself
    assert config(tmp_path, {"zero_optimization": {"stage": 1}}, stage="1")["zero_optimization"]["stage"] == 1


def test_offload(tmp_path):
    for found in (config(tmp_path, offload=True), config(tmp_path, {"zero_optimization": {"offload_optimizer": CPU}})):
        assert found["zero_optimization"]["offload_optimizer"] == CPU
        assert found["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in config(tmp_path)["zero_optimization"]
    auto = {"zero_optimization": {"offload_optimizer": {"device": "auto", "pin_memory": True}}}
    assert "offload_optimizer" not in config(tmp_path, auto)["zero_optimization"]
    assert config(tmp_path, auto, offload=True)["zero_optimization"]["offload_optimizer"] == CPU | {"pin_memory": True}
    none = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    assert "offload_optimizer" not in config(tmp_path, none)["zero_optimization"]
    with pytest.raises(ValueError, match=r"offload_optimizer.device none contradicts --train.zero_offload"):
        config(tmp_path, none, offload=True)


def test_what_is_turned_off_may_stay(tmp_path):
    assert config(tmp_path, {"steps_per_print": "auto"})["steps_per_print"] == config(tmp_path)["steps_per_print"]
    users = {"bfloat16": {"enabled": False}, "sparse_gradients": False, "communication_data_type": "auto"}
    assert not users.keys() & config(tmp_path, users | {"zero_optimization": {"cpu_offload": False}}).keys()


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    "users, message",
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer contradicts the flags: .* --optim.optimizer .*; remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler contradicts the flags: .* --optim.schedule"),
        ({"gradient_clipping": 1.0}, "gradient_clipping 1.0 contradicts --train.grad_clip, which makes it 0.5"),
        ({"train_batch_size": 16}, "train_batch_size 16 contradicts --data.batch_size, which makes it 8"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu 4 contradicts --train.micro_batch_siz"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4 contradicts .*, which makes it 2"),
        ({"fp16": {"enabled": True}}, "fp16 contradicts --train.dtype bf16"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage should be 0, 1, 2 or 3, found 4"),
        ({"zero_optimization": 3}, "zero_optimization should be an object, found 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "only offload_optimizer to the device cpu"),
        ({"zero_optimization": {"stage": 3, "offload_param": CPU}}, "only offload_optimizer to the device cpu"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": CPU}}, "--train.zero_offload needs .* 1, 2 or 3"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning contradicts the flags"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation is unknown.* did you mean 'zero_optimization'"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 is unknown, or would change the numbers"),  # bf16, by its old name
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is unknown, or would change the numbers"),
        ({"communication_data_type": "fp16"}, "communication_data_type is unknown, or would change the numbers"),
        ({"zero_optimization": {"reduce_bucket_sizes": 1}}, "zero_optimization: reduce_bucket_sizes is unknown"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients is unknown, or would"),
        ({"zero_optimization": {"cpu_offload": True}}, "zero_optimization: cpu_offload is unknown"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size should be a number .*found 'big'"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size should be a number of at least 1"),
        ({"steps_per_print": "x"}, "steps_per_print should be a number of steps, found 'x'"),
    ],
)
def test_what_contradicts_a_flag_is_named(users, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, users)


def test_fewer_rows_than_processes_are_left_to_the_batches(tmp_path):
    assert config(tmp_path, {"gradient_clipping": 0.5}, batch_size=1, world=4)["gradient_clipping"] == 0.5


def test_contradictions_of_flags(tmp_path):
    with pytest.raises(ValueError, match=r"zero_optimization.stage 1 contradicts --train.zero_stage 3"):
        config(tmp_path, {"zero_optimization": {"stage": 1}}, stage="3")
    with pytest.raises(ValueError, match=r"bf16 contradicts --train.dtype fp32"):
        config(tmp_path, {"bf16": {"enabled": True}}, dtype="fp32")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is not valid JSON"):
        config(tmp_path, file=tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError):
        config(tmp_path, file=tmp_path / "missing.json")

"""`adapter_config.json`, in which PEFT describes an adapter. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from files import read_json_object

CONFIG = "adapter_config.json"
PLAIN = {  # key of adapter_config.json -> the values with which it changes nothing in the computation
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "pissa"),  # others change the base's weights
}


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Return the contents of `adapter_config.json`, with PEFT's defaults.

    Raises FileNotFoundError where there is no such file, and ValueError that names what is not plain LoRA or DoRA.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no adapter directory: it has no {CONFIG}")
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} should describe an adapter of peft_type LORA, found {config.get('peft_type')}")
    config = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0} | config
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: base_model_name_or_path should be a name or null, found {base!r:.100}")
    for key in ("r", "lora_alpha", "lora_dropout"):
        if not isinstance(config[key], (int, float)):
            raise ValueError(f"{path} should set {key} to a number, found {config[key]!r}")
    for key, neutral in PLAIN.items():
        if key in config and config[key] not in neutral:
            raise ValueError(f"{path} sets {key} to {config[key]!r}, which is not supported here")
    return config

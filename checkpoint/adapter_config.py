"""`adapter_config.json`, PEFT's description of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
PLAIN = {  # keys of adapter_config.json that must be absent or have one of these values
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
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "pissa"),  # others change the base weights
}


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The contents of `adapter_config.json`, with PEFT's defaults; ValueError names what is not plain LoRA or DoRA."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no adapter directory: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else f"{config!r:.100}"
        raise ValueError(f"{path} should describe an adapter of peft_type LORA, found {found}")
    config = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0} | config
    for key in ("r", "lora_alpha", "lora_dropout"):
        if not isinstance(config[key], (int, float)):
            raise ValueError(f"{path} should set {key} to a number, found {config[key]!r}")
    for key, allowed in PLAIN.items():
        if key in config and config[key] not in allowed:
            raise ValueError(f"{path} sets {key} to {config[key]!r}, which is not read here")
    return config

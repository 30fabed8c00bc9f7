"""`adapter_config.json`, in which PEFT describes an adapter. Free of torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from files import read_json_object

CONFIG = "adapter_config.json"
PLAIN = {  # key of adapter_config.json -> the values with which it changes nothing in the computation
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
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
        if config.get(key) is not None and config[key] not in neutral:  # null leaves everything out
            raise ValueError(f"{path} sets {key} to {config[key]!r}, which is not supported here")
    for key in ("rank_pattern", "alpha_pattern"):
        check_pattern(path, key, config.setdefault(key, None) or {})
    return config


def check_pattern(path: Path, key: str, pattern: Any) -> None:
    """Raise ValueError unless a pattern maps regular expressions to numbers above 0."""
    kinds = int if key == "rank_pattern" else (int, float)
    if not isinstance(pattern, dict) or not all(isinstance(each, kinds) and each > 0 for each in pattern.values()):
        raise ValueError(f"{path}: {key} should map names of layers to numbers above 0, found {pattern!r:.100}")
    for expression in pattern:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{path}: {key} has {expression!r}, which is no regular expression: {error}") from None


def in_pattern(pattern: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """Return the number of the first expression that matches the whole name of a layer, or its end; else `default`."""
    matches = (number for key, number in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(matches, default)

"""The JSON files beside a vocabulary, as older and newer versions of transformers write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizer.base import SPECIAL_KEYS


def read_config(directory: Path) -> dict[str, Any]:
    """Read `tokenizer_config.json` and the files that older and newer versions of transformers write beside it.

    Special tokens come as their names, or None.
    """
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            config |= json.loads((directory / name).read_text(encoding="utf8"))
    if (directory / "chat_template.jinja").is_file():
        config["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf8")
    for key in SPECIAL_KEYS:
        token = config.get(key)
        config[key] = token["content"] if isinstance(token, dict) else token
    return config

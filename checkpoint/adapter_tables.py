"""The tables of an adapter's file that have a row for each token, under the several names that PEFT gives them.

After tokens were added, or with `trainable_token_indices`, PEFT writes for an embedding or a head `X`: `X.weight` and
`X.modules_to_save.weight` (trained in full), `X.original_module.weight` and `X.base_layer.weight` (the base model's),
and `X.token_adapter.trainable_tokens_delta` (the trained rows only).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quant.replace import is_head

OF_BASE = (".token_adapter.base_layer.weight", ".base_layer.weight", ".original_module.weight")
SAVED, ROWS = ".modules_to_save.weight", ".token_adapter.trainable_tokens_delta"

Tensors = dict[str, torch.Tensor]


def split_tables(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return the tensors that the adapter trains, tables that are trained in full as `X.weight`; and the base model's
    tables, by the name of `X`."""
    own, base = {}, {}
    for key, tensor in tensors.items():
        if suffix := next((each for each in OF_BASE if key.endswith(each)), None):
            base[key.removesuffix(suffix)] = tensor
        elif key.removesuffix(SAVED) + SAVED not in tensors:
            own[key] = tensor
    saved = {key.removesuffix(SAVED) + ".weight": tensor for key, tensor in tensors.items() if key.endswith(SAVED)}
    return {key: each for key, each in own.items() if key not in saved} | saved, base


def rows_needed(model: nn.Module, tensors: Tensors, prefix: str) -> int:
    """Return the number of tokens that the tables of an adapter's file have; 0 where it has none.

    prefix: of the names in the file, before those of the modules of `model`.
    """
    own, base = split_tables(tensors)
    tables = base | {key.removesuffix(".weight"): tensor for key, tensor in own.items() if key.endswith(".weight")}
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding) or is_head(name)}
    return max((len(table) for key, table in tables.items() if key.removeprefix(prefix) in names), default=0)


def fill_rows(
    model: nn.Module, tensors: Tensors, base: Tensors, config: dict[str, Any], prefix: str, tied: Mapping[str, str]
) -> Tensors:
    """Return the tensors with whole tables in the place of trained rows: the base model's, with those rows put in.

    config: of the adapter. tied: second name -> first name of a tied parameter; it has the rows of the first, too.
    Raises ValueError where the config does not say which rows they are.
    """
    filled = {}
    for key in [key for key in tensors if key.endswith(ROWS)]:
        name = key.removesuffix(ROWS)
        module = dict(model.named_modules()).get(name.removeprefix(prefix))
        if not isinstance(getattr(module, "weight", None), torch.Tensor):
            raise ValueError(f"the adapter trains rows of {name.removeprefix(prefix)}, which this model does not have")
        table, rows = base.get(name, module.weight).detach().clone(), tensors[key]
        indices = row_indices(config, name)
        if len(indices) != len(rows) or rows.shape[1:] != table.shape[1:] or max(indices, default=0) >= len(table):
            raise ValueError(
                f"the adapter has {len(rows)} rows of {name.removeprefix(prefix)}, and its config names {len(indices)} "
                f"of {len(table)}"
            )
        table[indices] = rows.to(table.dtype)
        own = f"{name}.weight".removeprefix(prefix)
        both = [own, *(second for second, first in tied.items() if first == own)]
        filled |= {f"{prefix}{each}": table for each in both if f"{prefix}{each}" not in filled}
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(ROWS)} | filled


def row_indices(config: dict[str, Any], name: str) -> list[int]:
    """Return the rows of the module `name` that `trainable_token_indices` lists."""
    listed = config.get("trainable_token_indices")
    if isinstance(listed, dict):
        # a tied head has no entry of its own: its rows are the embedding's
        own = [rows for key, rows in listed.items() if name == key or name.endswith(f".{key}")]
        listed = own[0] if own else next(iter(listed.values()), None)
    if not isinstance(listed, list) or not all(type(each) is int and each >= 0 for each in listed):
        raise ValueError(f"adapter_config.json: trainable_token_indices should list ids, found {listed!r:.100}")
    return listed

"""Adapters on a tree of modules: put in, switched, merged and taken apart again, by the names of the modules.

An adapted layer stays what it was, under its name and with its parameters; its adapters lie in its child `lora`, and a
forward hook adds what the active one says. Modules that are trained in full keep the original parameters and each
adapter's own in their child `full_copies`; those of the active adapter stand in the module itself.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora.dora import Dora
from lora.low_rank import EmbeddingLowRank, LowRank
from lora.pissa import Pissa
from lora.spec import LoraSpec
from lora.targets import matching
from quant.linear import QuantizedLinear
from quant.replace import dense_weight, is_head, replace

BASE = "base"  # the key of the original parameters of a module that is trained in full


class Adapters(nn.ModuleDict):
    """The adapters of one layer by name, and which of them acts."""

    active: str | None = None


def add_update(layer: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    """The forward hook of every adapted layer."""
    adapters = layer.lora
    if adapters.active is not None:
        return adapters[adapters.active](layer, args[0], out)
    for adapter in adapters.values():
        if isinstance(adapter, Pissa):  # the layer's own weight is not the base model's
            return adapter.original(args[0], out)
    return out


class AdaptedHead:
    """Mixed into the class of an adapted head: whoever reads `weight` (a loss that never makes all logits) gets the
    adapted one, through which gradients reach the adapter. `_parameters` holds the frozen one under the same name."""

    @property
    def weight(self) -> torch.Tensor:
        weight, adapters = self._parameters["weight"], self.lora
        return weight if adapters.active is None else adapters[adapters.active].merged(weight)


def inject(model: nn.Module, spec: LoraSpec, name: str = "default", trainable: bool = True) -> None:
    """Add an adapter to `model` and make it the active one. With `trainable`, everything else is frozen.

    Raises ValueError, before anything is changed, when no layer matches, the rank is larger than a layer, or a tied
    embedding is among the targets.
    """
    if not name.isidentifier() or name == BASE:
        raise ValueError(f"an adapter's name should be a word other than {BASE!r}, found {name!r}")
    if name in specs(model):
        raise ValueError(f"the model has an adapter {name!r} already; give the new one another name")
    if any(hasattr(module, "unmerged") for module in model.modules()):
        raise ValueError("the model's adapter is merged: unmerge it before another is added")
    if specs(model) and (spec.pissa or any(other.pissa for other in specs(model).values())):
        raise ValueError("a pissa adapter changes the base weights: it cannot stand beside others; merge it first")
    paths = matching(model, spec.targets, excluded=spec.train)
    for path in paths:
        check(model, path, spec)
        if trainable:  # a file may hold a larger rank, such as PiSSA's doubled one
            check_rank(model, path, spec.r)
    for path in paths:
        add(model.get_submodule(path), is_head(path), spec, name)
    train_in_full(model, spec.train, name)
    specs(model)[name] = spec
    set_active(model, name)
    if trainable:
        train_only(model, name)


def specs(model: nn.Module) -> dict[str, LoraSpec]:
    """The adapters of a model, by name."""
    return model.__dict__.setdefault("lora_specs", {})


def adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers with adapters, and their names."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "lora")]


def fully_trained(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that some adapter trains in full, and their names."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "full_copies")]


def check(model: nn.Module, path: str, spec: LoraSpec) -> None:
    """Raise ValueError when the layer `path` cannot have such an adapter."""
    layer = model.get_submodule(path)
    if spec.pissa and isinstance(layer, QuantizedLinear):
        raise ValueError(f"pissa changes the base weights, and {path} is quantized: use lora or dora")
    weight = layer._parameters.get("weight")
    if weight is not None and (
        others := [p for p, m in model.named_modules() if m is not layer and m._parameters.get("weight") is weight]
    ):
        raise ValueError(
            f"{path} and {others[0]} are one tied matrix, and a low-rank update of one would part them: "
            "leave both out of the targets (train_embed_norm trains them in full), or untie them"
        )
    if isinstance(layer, nn.Embedding) and (spec.dora or spec.pissa):
        raise ValueError(
            f"dora and pissa are made for linear layers, {path} is an embedding: leave it out of the targets"
        )
    if is_head(path) and (spec.dropout or spec.pissa):
        raise ValueError(f"the loss reads the weight of {path}: its adapter cannot have dropout, nor be of kind pissa")


def check_rank(model: nn.Module, path: str, r: int) -> None:
    """Raise ValueError when a rank is larger than the layer `path` can have."""
    shape = tuple(dense_weight(model.get_submodule(path)).shape)
    if r > min(shape):
        raise ValueError(f"rank {r} is larger than the smaller side of {path}, which is {shape}")


def add(layer: nn.Module, head: bool, spec: LoraSpec, name: str) -> None:
    """Give one layer an adapter, frozen."""
    if isinstance(layer, nn.Embedding):
        adapter: nn.Module = EmbeddingLowRank(layer, spec)
    else:
        adapter = (Dora if spec.dora else Pissa if spec.pissa else LowRank)(layer, spec)
    if not hasattr(layer, "lora"):
        layer.lora = Adapters()
        if head:
            layer.__class__ = type("Adapted" + type(layer).__name__, (AdaptedHead, type(layer)), {})
        else:
            layer.register_forward_hook(add_update)
    layer.lora[name] = adapter.requires_grad_(False)


def train_in_full(model: nn.Module, paths: tuple[str, ...], name: str) -> None:
    """Give the modules `paths` parameters of their own for an adapter, frozen; shared ones stay shared."""
    copies: dict[int, nn.Parameter] = {}
    for path in paths:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"the model has no module {path!r} to train in full") from None
        if not hasattr(module, "full_copies"):
            original = {key: p for key, p in module._parameters.items() if p is not None}
            module.full_copies = nn.ModuleDict({BASE: nn.ParameterDict(original)})
        own = nn.ParameterDict()
        for key, parameter in module.full_copies[BASE].items():
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            own[key] = copies[id(parameter)]
        module.full_copies[name] = own


def train_only(model: nn.Module, name: str) -> None:
    """Freeze everything but the adapter `name`."""
    model.requires_grad_(False)
    holders = [layer.lora for _, layer in adapted(model)]
    holders += [module.full_copies for _, module in fully_trained(model)]
    for holder in holders:
        if name in holder:
            holder[name].requires_grad_(True)


def set_active(model: nn.Module, name: str | None) -> None:
    """Let the adapter `name` act, and no other; None: the base model as it was."""
    if name is not None and name not in specs(model):
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(specs(model)) or 'none'}")
    if any(hasattr(module, "unmerged") for module in model.modules()):
        raise ValueError("the model's adapter is merged: unmerge it before another is chosen")
    for _, layer in adapted(model):
        layer.lora.active = name if name in layer.lora else None
    for _, module in fully_trained(model):
        chosen = name if name in module.full_copies else BASE
        for key, parameter in module.full_copies[chosen].items():
            module._parameters[key] = parameter
    model.__dict__["lora_active"] = name


def active(model: nn.Module) -> str | None:
    """The adapter that acts."""
    return model.__dict__.get("lora_active")


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model inside the block, such as the reference of DPO; the active adapter acts again after it."""
    before = active(model)
    set_active(model, None)
    try:
        yield
    finally:
        set_active(model, before)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put plain layers, with the active adapter in their weights, into the places of the adapted ones.

    The sum is made in float32 (or wider) and kept in the dtype of the base; quantized layers become dense float32 ones.
    `unmerge` puts the adapted layers back, which were not touched: bit for bit what they were.
    """
    if any(hasattr(module, "unmerged") for module in model.modules()):
        raise ValueError("the adapter is merged already: merging it again would add it twice")
    if active(model) is None:
        raise ValueError("no adapter is active: there is nothing to merge")
    for path, layer in adapted(model):
        replace(model, path, merged_layer(layer))


def merged_layer(layer: nn.Module) -> nn.Module:
    """A layer of the kind that was adapted, with the active adapter (if this layer has it) in its weight."""
    base, name = dense_weight(layer), layer.lora.active
    weight = base if name is None else layer.lora[name].merged(base).to(base.dtype)
    if isinstance(layer, QuantizedLinear):
        plain: nn.Module = layer.dense(weight)
    else:
        plain = copy.copy(layer)
        plain.__class__ = type(layer).__mro__[2] if isinstance(layer, AdaptedHead) else type(layer)
        plain._parameters = dict(layer._parameters, weight=nn.Parameter(weight, requires_grad=False))
        plain._modules = {key: child for key, child in layer._modules.items() if key != "lora"}
        hooks = layer._forward_hooks.items()
        plain._forward_hooks = OrderedDict((key, hook) for key, hook in hooks if hook is not add_update)
    plain.unmerged = (layer,)  # in a tuple, it is no child
    return plain


def unmerge(model: nn.Module) -> None:
    """Undo `merge`."""
    merged = [(path, module) for path, module in model.named_modules() if hasattr(module, "unmerged")]
    if not merged:
        raise ValueError("no adapter is merged: there is nothing to undo")
    for path, module in merged:
        replace(model, path, module.unmerged[0].to(next(module.parameters()).device))


def merge_for_good(model: nn.Module) -> None:
    """`merge`, and forget the adapters: a plain model remains; what is left quantized is made dense."""
    merge(model)
    for path, module in list(model.named_modules()):
        if hasattr(module, "unmerged"):
            del module.unmerged
        if hasattr(module, "full_copies"):
            del module.full_copies
        if isinstance(module, QuantizedLinear):
            replace(model, path, module.dense(module.dequantize()))
    for attribute in ("lora_specs", "lora_active"):
        del model.__dict__[attribute]


def describe(model: nn.Module) -> str:
    """One line: what share of the parameters trains."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = (p for name, p in model.named_parameters() if ".lora." not in name and ".full_copies." not in name)
    packed = (m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    total = sum(p.numel() for p in own) + sum(packed)
    return f"{trainable:,} parameters train, {trainable / total:.2%} of the model's {total:,}"

"""Add adapters to a tree of modules, switch, merge and unmerge them; modules are addressed by their names.

An adapted layer keeps its name and its parameters. Its child `lora` holds its adapters, and a forward hook adds the
update of the active one. A module that is trained in full holds the original parameters and those of each adapter in
its child `full_copies`; the parameters of the active adapter are also those of the module itself.
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
from quant.trained import RoundedLinear

BASE = "base"  # key of the original parameters in `full_copies`
CLASSES: dict[str, type[LowRank]] = {"dora": Dora, "pissa": Pissa}  # field of LoraSpec -> class; LowRank without any


def adapter_class(spec: LoraSpec) -> type[LowRank]:
    """Return the class of a linear layer's adapter."""
    return next((cls for field, cls in CLASSES.items() if getattr(spec, field)), LowRank)


class Adapters(nn.ModuleDict):
    """The adapters of one layer by name."""

    active: str | None = None
    """name of the active adapter; None: the base model"""


def add_update(layer: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    """Return the output (..., out) of an adapted layer; the forward hook of every such layer."""
    adapters = layer.lora
    if adapters.active is not None:
        return adapters[adapters.active](layer, args[0], out)
    for adapter in adapters.values():
        if adapter.changes_base:  # the layer's weight is not that of the base model
            return adapter.original(args[0], out)
    return out


class AdaptedHead:
    """Mix-in for the class of an adapted head. The loss reads `weight` instead of calling the module, so `weight` is
    the adapted one, through which gradients reach the adapter. `_parameters` holds the frozen one under that name."""

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight (out, in) with the active adapter."""
        weight, adapters = self._parameters["weight"], self.lora
        return weight if adapters.active is None else adapters[adapters.active].merged(weight)


def inject(model: nn.Module, spec: LoraSpec, name: str = "default", trainable: bool = True) -> None:
    """Add the adapter `name` to `model` and make it the active one; trainable: train it and freeze everything else.

    Raises ValueError, before anything is changed, when no layer matches, the rank is larger than a layer, or a tied
    embedding is among the targets.
    """
    if not name.isidentifier() or name == BASE:
        raise ValueError(f"an adapter's name should be a word other than {BASE!r}, found {name!r}")
    if name in specs(model):
        raise ValueError(f"the model has an adapter {name!r} already; give the new one another name")
    if any(hasattr(module, "unmerged") for module in model.modules()):
        raise ValueError("the model's adapter is merged: unmerge it before another is added")
    if specs(model) and any(adapter_class(each).changes_base for each in (spec, *specs(model).values())):
        raise ValueError("a pissa adapter changes the base weights: no other can be used with it; merge it first")
    paths = matching(model, spec.targets, excluded=spec.train)
    for path in paths:
        check_layer(model, path, spec)
        if trainable:  # the rank of a loaded adapter may be larger, such as PiSSA's doubled one
            check_rank(model, path, spec.of_layer(path).r)
    for path in paths:
        add(model.get_submodule(path), is_head(path), spec.of_layer(path), name)
    train_in_full(model, spec.train, name)
    specs(model)[name] = spec
    set_active(model, name)
    if trainable:
        train_only(model, name)


def specs(model: nn.Module) -> dict[str, LoraSpec]:
    """Return the descriptions of a model's adapters, by name."""
    return model.__dict__.setdefault("lora_specs", {})


def adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return names and modules of the layers with adapters."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "lora")]


def fully_trained(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return names and modules of the modules that some adapter trains in full."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "full_copies")]


def check_layer(model: nn.Module, path: str, spec: LoraSpec) -> None:
    """Raise ValueError when the layer `path` cannot have an adapter of `spec`."""
    layer, cls = model.get_submodule(path), adapter_class(spec)
    if isinstance(layer, RoundedLinear):
        raise ValueError(f"{path} is trained in few bits ({layer.kind}), and an adapter would not be: train it in full")
    if cls.changes_base and isinstance(layer, QuantizedLinear):
        raise ValueError(f"pissa changes the base weights, and {path} is quantized: use lora or dora")
    # a quantized layer has no such parameter
    weight = layer._parameters.get("weight")
    if weight is not None and (
        others := [p for p, m in model.named_modules() if m is not layer and m._parameters.get("weight") is weight]
    ):
        raise ValueError(
            f"{path} and {others[0]} are one tied matrix, and a low-rank update of one would untie them: "
            "leave both out of the targets (train_embed_norm trains them in full), or untie them"
        )
    if isinstance(layer, nn.Embedding) and not cls.takes_embeddings:
        raise ValueError(f"dora and pissa need linear layers, {path} is an embedding: leave it out of the targets")
    if is_head(path) and (spec.dropout or cls.changes_base):
        raise ValueError(f"the loss reads the weight of {path}: its adapter cannot have dropout, nor be of kind pissa")


def check_rank(model: nn.Module, path: str, r: int) -> None:
    """Raise ValueError when the rank `r` is larger than the smaller side of the layer `path`."""
    shape = tuple(dense_weight(model.get_submodule(path)).shape)
    if r > min(shape):
        raise ValueError(f"--lora.r {r} is larger than the smaller side of {path}, which is {shape}")


def add(layer: nn.Module, head: bool, spec: LoraSpec, name: str) -> None:
    """Add a frozen adapter to one layer; head: the layer computes the logits."""
    adapter = (EmbeddingLowRank if isinstance(layer, nn.Embedding) else adapter_class(spec))(layer, spec)
    if not hasattr(layer, "lora"):
        layer.lora = Adapters()
        if head:  # a property is found on the class only, and other layers of this class must not get it
            layer.__class__ = type("Adapted" + type(layer).__name__, (AdaptedHead, type(layer)), {})
        else:
            layer.register_forward_hook(add_update)
    layer.lora[name] = adapter.requires_grad_(False)


def train_in_full(model: nn.Module, paths: tuple[str, ...], name: str) -> None:
    """Give the modules `paths` frozen copies of their parameters for the adapter `name`; tied ones stay tied."""
    copies: dict[int, nn.Parameter] = {}  # id of the original -> copy
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
    """Make `name` the active adapter; None: the original base model. Raises ValueError for an unknown name."""
    if name is not None and name not in specs(model):
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(specs(model)) or 'none'}")
    if any(hasattr(module, "unmerged") for module in model.modules()):
        raise ValueError("the model's adapter is merged: unmerge it before another is activated")
    for _, layer in adapted(model):
        layer.lora.active = name if name in layer.lora else None
    for _, module in fully_trained(model):
        source = name if name in module.full_copies else BASE
        for key, parameter in module.full_copies[source].items():
            module._parameters[key] = parameter  # replaced, not copied into: the optimizer holds these objects
    model.__dict__["lora_active"] = name


def active(model: nn.Module) -> str | None:
    """Return the name of the active adapter; None: the base model."""
    return model.__dict__.get("lora_active")


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Use the base model inside the block, such as the reference of DPO, and the active adapter again after it."""
    before = active(model)
    set_active(model, None)
    try:
        yield
    finally:
        set_active(model, before)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace the adapted layers by plain ones whose weights contain the active adapter.

    The sum is computed in float32 (or wider) and rounded to the dtype of the base; a quantized layer becomes a dense
    float32 one. The adapted layers are kept unchanged, and `unmerge` puts them back. Raises ValueError when the adapter
    is merged already, or none is active.
    """
    if any(hasattr(module, "unmerged") for module in model.modules()):
        raise ValueError("the adapter is merged already: merging it again would add it twice")
    if active(model) is None:
        raise ValueError("no adapter is active: there is nothing to merge")
    for path, layer in adapted(model):
        replace(model, path, merged_layer(layer))


def merged_layer(layer: nn.Module) -> nn.Module:
    """Return a layer of the original class whose weight contains the active adapter, if this layer has it."""
    base, name = dense_weight(layer), layer.lora.active
    weight = base if name is None else layer.lora[name].merged(base).to(base.dtype)
    if isinstance(layer, QuantizedLinear):
        plain: nn.Module = layer.dense(weight)
    else:
        # a shallow copy shares bias and hooks; what differs gets new containers, so that `layer` stays unchanged
        plain = copy.copy(layer)
        # an adapted head has the classes (Adapted..., AdaptedHead, original class)
        plain.__class__ = type(layer).__mro__[2] if isinstance(layer, AdaptedHead) else type(layer)
        plain._parameters = dict(layer._parameters, weight=nn.Parameter(weight, requires_grad=False))
        plain._modules = {key: child for key, child in layer._modules.items() if key != "lora"}
        hooks = layer._forward_hooks.items()
        plain._forward_hooks = OrderedDict((key, hook) for key, hook in hooks if hook is not add_update)
    plain.unmerged = (layer,)  # in a tuple, so that it is not registered as a child
    return plain


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: put the adapted layers back. Raises ValueError when no adapter is merged."""
    layers = [(path, module) for path, module in model.named_modules() if hasattr(module, "unmerged")]
    if not layers:
        raise ValueError("no adapter is merged: there is nothing to undo")
    for path, module in layers:
        replace(model, path, module.unmerged[0].to(next(module.parameters()).device))


def merge_for_good(model: nn.Module) -> None:
    """Merge the active adapter and remove all of them; layers that are still quantized become dense float32 ones."""
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
    """Return one line about the number and the share of the parameters that train."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = (p for name, p in model.named_parameters() if ".lora." not in name and ".full_copies." not in name)
    # a quantized weight is no parameter
    packed = (m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    total = sum(p.numel() for p in own) + sum(packed)
    return f"{trainable:,} parameters train, {trainable / total:.2%} of the model's {total:,}"

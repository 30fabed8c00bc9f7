"""Save and load adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

The name of a tensor is `base_model.model.` + the layer's name + `.lora_A.weight` (r, in), `.lora_B.weight` (out, r),
`.lora_magnitude_vector` (out,) or `.lora_embedding_A` (r, V), `.lora_embedding_B` (dim, r). Modules that are trained in
full keep their parameters' names behind the prefix. The layers that an adapter changes are read from these names alone.

`model` is here the tree of modules that these names belong to: `module_tree` of our models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from checkpoint.adapter_config import CONFIG, in_pattern, read_adapter_config
from checkpoint.adapter_tables import fill_rows, rows_needed, split_tables
from checkpoint.safetensors_files import listed, opened, second_names
from lora.inject import adapted, fully_trained, inject, specs, train_only
from lora.spec import LoraSpec
from lora.targets import matching, shortest
from quant.replace import kind_of_base

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
UNTIE = "give each a matrix of its own with python convert.py merge --untie True"


def save(directory: Path, model: nn.Module, name: str = "default", base: str | None = None) -> None:
    """Write the adapter `name` of `model`; base: name or path of the model that it belongs to.

    A PiSSA adapter is written as the LoRA of rank 2r that adds the same to the original weights. If the weights under
    the adapter are quantized, the metadata of its file says how (see `base_kind`).
    """
    spec = spec_of(model, name)
    targets = matching(model, spec.targets, excluded=spec.train)
    times = 2 if spec.pissa else 1  # factor on the rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.r * times,
        # the scaling, alpha / r or (rsLoRA) alpha / sqrt(r), stays the same
        "lora_alpha": spec.alpha * (times**0.5 if spec.rslora else times),
        "lora_dropout": spec.dropout,
        "target_modules": shortest(model, targets),
        "modules_to_save": shortest(model, spec.train) or None,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "bias": "none",
        "rank_pattern": {re.escape(path): r * times for path, r, _ in spec.layers},
        "alpha_pattern": {re.escape(path): a * (times**0.5 if spec.rslora else times) for path, _, a in spec.layers},
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2))
    kind, double = kind_of_base(model)
    # one key for both: safetensors writes several in a random order, and the file would differ from save to save
    metadata = {"format": "pt"} if kind == "full" else {"base": f"{kind} double" if double else kind}
    save_file(state_dict(model, name), directory / WEIGHTS, metadata=metadata)


def base_kind(directory: Path) -> tuple[str, bool]:
    """Return how the weights under an adapter were kept in training: `LoraArgs.base` and `.double_quant`.

    ("full", False) where the file does not say, as in PEFT's own.
    """
    with opened(weights_file(directory)) as file:
        kind, _, double = (file.metadata() or {}).get("base", "full").partition(" ")
    return kind, bool(double)


def state_dict(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """Return copies of an adapter's tensors under the names that they have in its file."""
    state = {}
    for path, layer in adapted(model):
        if name in layer.lora:
            adapter = layer.lora[name]
            tensors = adapter.as_lora() if adapter.changes_base else dict(adapter.named_parameters())
            state |= {f"{PREFIX}{path}.{adapter.key(key)}": tensor for key, tensor in tensors.items()}
    for path, module in fully_trained(model):
        if name in module.full_copies:
            state |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in module.full_copies[name].items()}
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}


@torch.no_grad()
def load(
    model: nn.Module,
    directory: Path,
    name: str = "default",
    trainable: bool = False,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Add the adapter in a PEFT directory to `model` and activate it.

    tied: second name -> first name of each tied parameter when the adapter was trained (None: those of `model`).
    Raises ValueError that names what is not LoRA, belongs to another model, or has another shape.
    """
    config = read_adapter_config(directory)
    tensors, base = split_tables(read_tensors(directory))
    tensors = fill_rows(model, tensors, base, config, PREFIX, second_names(model) if tied is None else tied)
    names = dict.fromkeys(path for path, _ in model.named_modules())  # in the order of the tree
    paths, train = set(), set()
    for key in tensors:
        path, is_lora, _ = key.removeprefix(PREFIX).partition(".lora_")
        (paths if is_lora else train).add(path if is_lora else path.rpartition(".")[0])
    if strangers := sorted((paths | train) - names.keys()):
        raise ValueError(f"{directory} is an adapter of another model: this one has no {short(strangers)}")
    if not paths:
        raise ValueError(f"{directory}/{WEIGHTS} holds no LoRA tensors")
    spec = LoraSpec(
        r=config["r"],
        alpha=config["lora_alpha"],
        layers=tuple(read_patterns(config, [path for path in names if path in paths])),
        dropout=config["lora_dropout"],
        targets=tuple(path for path in names if path in paths),
        train=tuple(path for path in names if path in train),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
        pissa=config.get("init_lora_weights") == "pissa",
    )
    compare(shapes(model, spec), tensors, directory)
    compare_tied(model, spec, tensors, directory)
    for key, table in base.items():  # where tokens were added, they have rows that the base model does not have
        model.get_submodule(key.removeprefix(PREFIX)).weight.copy_(table)
    inject(model, spec, name, trainable=False)
    copy_into(model, name, tensors)
    if trainable:
        train_only(model, name)


def read_patterns(config: dict[str, Any], paths: Iterable[str]) -> Iterator[tuple[str, int, float]]:
    """Yield name, rank and alpha of each of the layers `paths` whose rank or alpha is not that of the whole adapter."""
    for path in paths:
        r = in_pattern(config["rank_pattern"], path, config["r"])
        alpha = in_pattern(config["alpha_pattern"], path, config["lora_alpha"])
        if (r, alpha) != (config["r"], config["lora_alpha"]):
            yield path, r, alpha


def vocabulary_of(model: nn.Module, directory: Path) -> int:
    """Return the number of tokens that an adapter's embedding or head has; 0 where it holds neither as a whole."""
    return rows_needed(model, read_tensors(directory), PREFIX)


def spec_of(model: nn.Module, name: str) -> LoraSpec:
    """Return the spec of a model's adapter; raises ValueError where there is none of this name."""
    if name not in specs(model):
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(specs(model)) or 'none'}")
    return specs(model)[name]


@torch.no_grad()
def restore(model: nn.Module, directory: Path, name: str = "default") -> None:
    """Copy the tensors of an adapter that `save` wrote into the same adapter of the same model, bit for bit."""
    expected = {key: tuple(tensor.shape) for key, tensor in state_dict(model, name).items()}
    tensors = read_tensors(directory)
    compare(expected, tensors, directory)
    copy_into(model, name, tensors)


def copy_into(model: nn.Module, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into the adapter `name`; the caller has compared their shapes."""
    for path, layer in adapted(model):
        if name not in layer.lora:
            continue
        adapter = layer.lora[name]
        own = {key: tensors[f"{PREFIX}{path}.{adapter.key(key)}"] for key, _ in adapter.named_parameters()}
        # PiSSA is saved as a LoRA of twice its rank (see `save`)
        if adapter.changes_base and len(own["lora_A"]) == 2 * len(adapter.lora_A):
            adapter.restore(layer, **own)
        else:
            for key, parameter in adapter.named_parameters():
                parameter.copy_(own[key])
    for path, module in fully_trained(model):
        for key, parameter in module.full_copies[name].items() if name in module.full_copies else ():
            parameter.copy_(tensors[f"{PREFIX}{path}.{key}"])


def shapes(model: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor in the file of such an adapter of `model`."""
    expected: dict[str, tuple[int, ...]] = {}
    for path in spec.targets:
        layer, prefix, r = model.get_submodule(path), f"{PREFIX}{path}.", spec.of_layer(path).r
        if isinstance(layer, nn.Embedding):
            expected[prefix + "lora_embedding_A"] = (r, layer.num_embeddings)
            expected[prefix + "lora_embedding_B"] = (layer.embedding_dim, r)
        elif hasattr(layer, "in_features"):
            expected[prefix + "lora_A.weight"] = (r, layer.in_features)
            expected[prefix + "lora_B.weight"] = (layer.out_features, r)
            if spec.dora:
                expected[prefix + "lora_magnitude_vector"] = (layer.out_features,)
    for path in spec.train:
        for key, parameter in model.get_submodule(path)._parameters.items():
            if parameter is not None:
                expected[f"{PREFIX}{path}.{key}"] = tuple(parameter.shape)
    return expected


def compare(expected: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Raise ValueError unless `tensors`, of an adapter's file, have exactly the names and shapes of `expected`."""
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{directory}/{WEIGHTS} lacks {short(missing)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{directory}/{WEIGHTS} holds what this adapter has no place for: {short(unknown)}")
    other = [
        f"{key.removeprefix(PREFIX)} is {tuple(tensors[key].shape)} there and {shape} here"
        for key, shape in expected.items()
        if tuple(tensors[key].shape) != shape
    ]
    if other:
        raise ValueError(f"{directory} is an adapter of another model: {short(other)}")


def compare_tied(model: nn.Module, spec: LoraSpec, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Raise ValueError when an adapter holds two versions of a parameter that modules of this model share, or changes
    one of them by a low-rank update."""
    shared: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        shared.setdefault(id(module._parameters.get("weight")), []).append(path)
    for path in spec.targets:
        weight = model.get_submodule(path)._parameters.get("weight")  # a quantized layer has none
        if weight is not None and len(both := shared[id(weight)]) > 1:
            raise ValueError(f"{directory} trained {short(both)} apart, which are tied in this model: {UNTIE}")
    first: dict[int, str] = {}
    for path in spec.train:
        for key, parameter in model.get_submodule(path)._parameters.items():
            name = f"{PREFIX}{path}.{key}"
            other = first.setdefault(id(parameter), name)
            if parameter is not None and not torch.equal(tensors[other], tensors[name]):
                raise ValueError(
                    f"{directory} trained {short([other, name])} apart, which are tied in this model: {UNTIE}"
                )


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's file by their names there.

    Raises ValueError for numbers that are not finite.
    """
    path = weights_file(directory)
    with opened(path) as file:
        names = file.keys()
        tensors = {key: file.get_tensor(key) for key in names}
    if broken := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} holds numbers that are not finite, in {short(broken)}: its training has diverged")
    return tensors


def weights_file(directory: Path) -> Path:
    """Return the path of an adapter's tensors; raises FileNotFoundError where there are none."""
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no {WEIGHTS}; only safetensors are read")
    return path


def short(names: Iterable[str]) -> str:
    """Return some names for a message, as in the model: without the prefix of an adapter's file."""
    return listed(name.removeprefix(PREFIX) for name in names)

"""Model directories whose linear layers are quantized: ours and other programs'.

`config.json` says how in `quantization_config`; each quantized layer has several tensors in the place of its weight
(quant/formats.py). Embeddings, norms and the head are kept as they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint import config_json, safetensors_files
from checkpoint.locate import read_config
from model import Transformer
from quant import qat
from quant.formats import FORMATS, Scheme, bitnet_config
from quant.kinds import BITNETS
from quant.linear import QuantizedLinear
from quant.replace import base_layers, need_package, replace
from quant.trained import kind_of_bits

KEY = "quantization_config"
BITNET_METHODS = {bitnet_config(kind, online=False)["quant_method"]: kind for kind in BITNETS}


def read_scheme(config: dict[str, Any]) -> Scheme | None:
    """Return how a `config.json` says that its layers are quantized, None where they are not.

    Raises ValueError for a method that is not read here, or settings that it cannot have.
    """
    settings = config.get(KEY)
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"config.json: {KEY} should be a mapping, found {settings!r:.100}")
    method = method_of(settings)
    if method == "gptq":
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if layout not in ("gptq", "gptq_v2"):
            raise ValueError(f"config.json: checkpoint_format {layout!r} is not read here; gptq and gptq_v2 are")
        scheme = checked(Scheme(layout, settings.get("bits"), settings.get("group_size", -1)))
        return scheme._replace(layers=layers_of_gptq(settings.get("dynamic") or {}, scheme))
    if method == "awq":
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise ValueError(f"config.json: AWQ's version {version!r} is not read here; gemm is")
        return checked(Scheme("awq", settings.get("bits", 4), settings.get("group_size", 128)))
    if method == "compressed-tensors":
        return scheme_of_compressed(settings)
    if method == "bitsandbytes":
        return scheme_of_bnb(settings)
    if kind := BITNET_METHODS.get(method):
        if settings.get("linear_class", "bitlinear") != "bitlinear" or settings.get("use_rms_norm"):
            found = {key: settings[key] for key in ("linear_class", "use_rms_norm") if key in settings}
            raise ValueError(
                "config.json: packed BitNet weights are read with linear_class bitlinear and without use_rms_norm, "
                f"found {found!r:.100}"
            )
        return Scheme("bitnet", 2 if kind == "b158" else 1, kind=kind)
    raise ValueError(
        f"config.json: weights quantized by {method!r} are not read here; gptq, awq, compressed-tensors, "
        "bitsandbytes and bitnet are"
    )


def trained_bits(config: dict[str, Any]) -> str | None:
    """Return the kind of a `config.json`'s layers that are rounded as they are used (BitNet, QAT), else None."""
    settings = config.get(KEY)
    if not isinstance(settings, dict) or settings.get("quantization_mode") != "online":
        return None
    method = method_of(settings)
    if method == qat.METHOD:
        return qat.kind_of_config(settings)
    if method in BITNET_METHODS and settings.get("use_rms_norm"):
        raise ValueError("config.json: BitNet layers with norms of their own (use_rms_norm) are not read here")
    return BITNET_METHODS.get(method)


def method_of(settings: dict[str, Any]) -> str | None:
    """Return `quant_method`, None where there is none; raise ValueError where it is no text."""
    method = settings.get("quant_method")
    if method is not None and not isinstance(method, str):
        raise ValueError(f"config.json: {KEY} should have a text as its quant_method, found {method!r:.100}")
    return method


def bits_of(model: nn.Module) -> dict[str, Any]:
    """Return what `config.json` says of layers that are trained in few bits; nothing where there are none."""
    kind = kind_of_bits(model)
    if kind is None:
        return {}
    return {KEY: bitnet_config(kind, online=True) if kind in BITNETS else qat.config_of(kind)}


def layers_of_gptq(dynamic: Any, scheme: Scheme) -> tuple[tuple[str, Scheme], ...]:
    """Return the schemes of single layers in gptqmodel's `dynamic`: regular expression -> settings. Those that are not
    quantized (-:) are known by their tensors."""
    if not isinstance(dynamic, dict) or not all(isinstance(own, dict) for own in dynamic.values()):
        raise ValueError(f"config.json: dynamic should map regular expressions to settings, found {dynamic!r:.100}")
    return tuple(
        (
            checked_pattern(pattern.removeprefix("+:")),
            checked(scheme._replace(**{key: own[key] for key in ("bits", "group_size") if key in own})),
        )
        for pattern, own in dynamic.items()
        if not pattern.startswith("-:")
    )


def checked_pattern(pattern: str) -> str:
    """Return a regular expression; raise ValueError where it is none."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"config.json: {KEY} has {pattern!r}, which is no regular expression: {error}") from None
    return pattern


def scheme_of_compressed(settings: dict[str, Any]) -> Scheme:
    """Return the scheme of compressed-tensors settings: packed integers, or int8 with or without inputs of 8 bits.

    Groups of layers may differ; a layer belongs to a group by its name, else a regular expression, else its class.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"config.json: config_groups should map names to at least one group, found {groups!r:.100}")
    schemes = [(group, scheme_of_group(group, settings)) for group in groups.values()]
    if len(schemes) == 1:
        return schemes[0][1]
    ranked = []
    for group, scheme in schemes:
        for target in targets_of(group):
            rank = (0, f"{re.escape(target)}$") if "." in target else (2, "")
            ranked.append(((1, checked_pattern(target[3:])) if target.startswith("re:") else rank, scheme))
    ranked.sort(key=lambda each: each[0][0])
    return schemes[0][1]._replace(layers=tuple((pattern, scheme) for (_, pattern), scheme in ranked))


def targets_of(group: dict[str, Any]) -> list[str]:
    """Return the names, regular expressions and classes of the layers of a group of compressed-tensors settings."""
    targets = group.get("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"config.json: targets of {KEY} should be a list of texts, found {targets!r:.100}")
    return targets


def scheme_of_group(group: Any, settings: dict[str, Any]) -> Scheme:
    """Return the scheme of one group of compressed-tensors settings."""
    weights = group.get("weights") if isinstance(group, dict) else None
    inputs = group.get("input_activations") if isinstance(group, dict) else None
    form = (isinstance(group, dict) and group.get("format")) or settings.get("format")
    if not isinstance(weights, dict) or form not in ("pack-quantized", "int-quantized"):
        raise ValueError(
            "config.json: of compressed-tensors, the formats pack-quantized and int-quantized are read here, found "
            f"{form!r:.50} with weights {weights!r:.100}"
        )
    if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
        raise ValueError(
            "config.json: weights of compressed-tensors are read with type int and strategy group or channel, found "
            f"{weights.get('type', 'int')!r:.50} and {weights.get('strategy')!r:.50}"
        )
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    known = isinstance(inputs, dict) and all(inputs.get(key, wanted[key]) == wanted[key] for key in wanted)
    if inputs and (form != "int-quantized" or not known):
        raise ValueError(
            f"config.json: input_activations are read here beside int-quantized weights with {wanted}, "
            f"found {inputs!r:.200} beside {form}"
        )
    if form == "int-quantized":
        if (weights.get("strategy"), weights.get("num_bits")) != ("channel", 8):
            raise ValueError(
                "config.json: int-quantized weights are read here with num_bits 8 and strategy channel, found "
                f"{weights.get('num_bits')!r:.50} and {weights.get('strategy')!r:.50}"
            )
        return Scheme("int-quantized", 8, kind="w8a8" if inputs else "int8")
    size = weights.get("group_size") if weights["strategy"] == "group" else -1
    symmetric = weights.get("symmetric", True) is not False
    return checked(Scheme("compressed-tensors", weights.get("num_bits"), size, symmetric))


def scheme_of_bnb(settings: dict[str, Any]) -> Scheme:
    """Return the scheme of bitsandbytes' settings."""
    four, eight = bool(settings.get("load_in_4bit")), bool(settings.get("load_in_8bit"))
    if four == eight:
        found = "both" if four else "neither"
        raise ValueError(f"config.json: {KEY} should set one of load_in_4bit and load_in_8bit, found {found}")
    if four:
        if (storage := settings.get("bnb_4bit_quant_storage", "uint8")) != "uint8":
            raise ValueError(f"config.json: bnb_4bit_quant_storage {storage!r} is not read here; uint8 is")
        need_package("nf4", "config.json: weights in NF4 or FP4 (bitsandbytes)")
        return Scheme("bnb_4bit", 4)
    threshold = settings.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
        raise ValueError(f"config.json: llm_int8_threshold should be a number from 0 on, found {threshold!r}")
    return Scheme("bnb_8bit", 8, threshold=float(threshold))


def checked(scheme: Scheme) -> Scheme:
    """Return the scheme; raise ValueError where its width or its groups cannot be."""
    if type(scheme.bits) is not int or scheme.bits not in (2, 3, 4, 8):
        raise ValueError(f"config.json: {KEY} should have 2, 3, 4 or 8 bits, found {scheme.bits!r}")
    size = scheme.group_size
    if type(size) is not int or not (0 < size < 2**31 or size == -1):
        raise ValueError(f"config.json: {KEY} should have a group_size of -1 or more than 0, found {size!r:.50}")
    return scheme


# ---- reading


def load(directory: Path, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """Load a quantized model: its linear layers as QuantizedLinear, everything else in `dtype`.

    Raises ValueError that names the tensors that are missing or of another shape.
    """
    config = read_config(directory)
    safetensors_files.check_depth(config, directory)
    try:
        scheme = read_scheme(config)
        args = config_json.read({key: value for key, value in config.items() if key != KEY})
        safetensors_files.check_size(args, directory)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    with torch.device("meta"):
        model = Transformer(args, initialize=False).to(dtype)
    files = tensor_files(directory)
    for path, layer in base_layers(model):
        names = {name[len(path) + 1 :]: file for name, file in files.items() if name.startswith(f"{path}.")}
        if "weight" not in names or names.keys() - {"weight", "bias"}:
            replace(model, path, load_layer(directory, path, layer, names, scheme.of(path)))
    quantized = {path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not quantized:
        raise ValueError(f"{directory}: config.json has a {KEY}, and no layer in the files is quantized")
    own = {name: t for name, t in safetensors_files.state_of(model).items() if name.rpartition(".")[0] not in quantized}
    elsewhere = {name for name in files if any(name.startswith(f"{path}.") for path in quantized)}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    tied = safetensors_files.second_names(model)
    read = safetensors_files.read_tensors(directory, shapes, tied, elsewhere)
    state = {name: tensor.to(own[name].dtype) for name, tensor in read}
    model.load_state_dict(state, strict=False, assign=True)
    for second, first in tied.items():
        module, _, name = second.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(first))
    return model.to(device)


def tensor_files(directory: Path) -> dict[str, Path]:
    """Return the file of every tensor in a directory."""
    files = {}
    for path in safetensors_files.weight_files(directory):
        with safetensors_files.opened(path) as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def load_layer(directory: Path, path: str, layer: nn.Linear, names: dict[str, Path], scheme: Scheme) -> QuantizedLinear:
    """Return the quantized layer `path`, in the place of `layer` (on the meta device). names: last name -> file."""
    form = FORMATS[scheme.layout]
    if missing := sorted(form.names - names.keys()):
        raise ValueError(f"{directory} lacks {path}.{missing[0]}, which a layer quantized by {scheme.layout} has")
    tensors = {name: safetensors_files.read_one(file, f"{path}.{name}") for name, file in names.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{directory}: {path}.{name} is not finite: the file is damaged, or its scales overflowed")
    try:
        quantized = form.read(tensors, layer, scheme)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"{directory}: the tensors of {path} do not fit together: {error}") from None
    bias = tensors.get("bias")
    if bias is not None and layer.bias is None and bias.any():
        raise ValueError(f"{directory}: {path} has a bias, and config.json gives it none")
    quantized.in_files = True
    if layer.bias is not None:
        if bias is None:
            raise ValueError(f"{directory} lacks {path}.bias")
        quantized.bias = nn.Parameter(bias.to(layer.bias.dtype), requires_grad=False)
    return quantized


# ---- writing


def save(directory: Path, model: Transformer, scheme: Scheme, ids: dict[str, Any]) -> None:
    """Write `config.json` and the tensors of a model whose linear layers are quantized as `scheme` says.

    ids: special tokens' ids for config.json. Tensors that are not quantized keep their dtype.
    """
    state = dict(tensors_of(model, scheme))
    config = config_json.write(model.args) | {"dtype": str(model.dtype).removeprefix("torch.")} | ids
    config[KEY] = FORMATS[scheme.layout].config(scheme, model.dtype)
    safetensors_files.write_model(directory, config, state)
    if scheme.layout in ("gptq", "gptq_v2", "awq"):  # where auto-gptq and AutoAWQ look first
        name = "quant_config.json" if scheme.layout == "awq" else "quantize_config.json"
        (directory / name).write_text(json.dumps(config[KEY], indent=2))


def tensors_of(model: Transformer, scheme: Scheme) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model directory by name: those of quantized layers, all others as they are."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, tensor in safetensors_files.state_of(model).items():
        if name.rpartition(".")[0] not in layers or name.endswith(".bias"):
            yield name, tensor
    if scheme.layout.startswith("gptq"):  # auto-gptq leaves a head that is not in the file uninitialised, tied or not
        state = model.state_dict()
        yield from ((second, state[second].clone()) for second in safetensors_files.second_names(model))
    for path, layer in layers.items():
        try:
            tensors = FORMATS[scheme.layout].write(layer, model.dtype)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if scheme.symmetric:
            tensors.pop("weight_zero_point", None)  # compressed-tensors keeps none of a symmetric grid
        for name, tensor in tensors.items():
            yield f"{path}.{name}", tensor

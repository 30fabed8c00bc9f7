"""The front door of `checkpoint/`: load a model or an adapter from its directory, save a model, load weights.

What the directories hold is described in locate.py; adapters are saved by peft.py. Whoever saves writes to a directory
aside (`files.written_aside`), so that a directory appears under its name only when it is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from checkpoint import config_json, peft, quantized, safetensors_files, transformers_model
from checkpoint.extend import resize, untie
from checkpoint.locate import CONFIG, find_base, is_adapter, read_config
from checkpoint.transformers_model import TransformersModel
from cli.memory import check_memory
from lora import adapters
from model import Transformer
from quant.replace import refuse_quantized
from quant.train_bits import train_in_bits
from tokenizer import Tokenizer


def load_model(
    directory: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    base: Path | None = None,
) -> Transformer | TransformersModel:
    """Load the model in a directory, or the adapter in it: its base with the adapter merged into the weights.

    The parameters are in `dtype` on `device`. base: directory of the model that an adapter belongs to; None: the one
    that its config names. Raises ValueError or FileNotFoundError that says what is missing or does not fit.
    """
    if is_adapter(directory):
        return load_adapted(directory, find_base(directory, base)).to(device, dtype)
    if base is not None:
        raise ValueError(f"--base is for an adapter, and {directory} is a whole model: leave it out")
    return load_whole_model(directory, device, dtype)


def load_whole_model(
    directory: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    to_train: bool = False,
) -> Transformer | TransformersModel:
    """Load the model in a directory as `load_model` does; refuse an adapter, and with `to_train` a quantized model.

    Models of the LLaMA family become our `Transformer`, whose parameters are views of the mapped file where dtype and
    device are the file's; any other causal language model is transformers' own, behind the same interface.
    """
    config = read_config(directory)
    if config.get("model_type", "llama") not in config_json.FAMILY:
        return transformers_model.load(directory, device, dtype)
    bits = quantized.trained_bits(config)
    if config.get(quantized.KEY) and not bits:
        model = quantized.load(directory, device, dtype)
        if to_train:
            refuse_quantized(model, f"training {directory} in full would need them")
        return model

    def make(config: dict[str, Any]) -> Transformer:
        args = config_json.read(config)
        safetensors_files.check_size(args, directory)
        if torch.device(device).type == "cpu" and dtype != kept_dtype(directory):  # not only mapped, but converted
            what = f"the model in {directory}, in {str(dtype).removeprefix('torch.')},"
            check_memory(what, args.n_parameters() * dtype.itemsize, "use a machine with more, or fewer bits")
        model = Transformer(args, initialize=False)
        if bits:
            train_in_bits(model, bits)
        return model

    return safetensors_files.load(make, directory, device, dtype)


def load_adapted(
    adapter: Path, base: Path, quantization: tuple[str, bool] | None = None, separate: bool = False
) -> Transformer | TransformersModel:
    """Load the model in `base` and add an adapter to its weights, in float32 on the CPU.

    quantization: what the base is quantized to and back before the sum, as `peft.base_kind` returns it; None: what the
    adapter was trained on. separate: give a head that is tied to the embedding a matrix of its own first. Where the
    adapter's tables have more rows, because tokens were added, the model grows.
    """
    model = load_whole_model(base)
    size = model.args.vocab_size
    if (rows := peft.vocabulary_of(model.module_tree, adapter)) > size:
        resize(model, size, [[]] * (rows - size))
    tied = safetensors_files.second_names(model.module_tree)
    if separate:
        untie(model)
    adapters.quantize_base(model.module_tree, *(quantization or peft.base_kind(adapter)))
    peft.load(model.module_tree, adapter, tied=tied)
    adapters.merge_for_good(model.module_tree)
    return model


def load_weights(model: Transformer | TransformersModel, directory: Path) -> None:
    """Copy the weights of a model directory into the parameters that `model` has, which an optimizer may hold."""
    if isinstance(model, Transformer):
        safetensors_files.copy_into(model, directory)
    else:
        transformers_model.copy_into(model, directory)


def save_model(
    directory: Path,
    model: Transformer | TransformersModel,
    tokenizer: Tokenizer | None = None,
    stop_ids: list[int] | None = None,
    weights: bool = True,
) -> None:
    """Write `model` and its tokenizer as a Hugging Face directory; parameters keep their dtype.

    stop_ids: ids that end an answer; None: the tokenizer's eos. weights: False leaves them out, for a sharded
    checkpoint.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    refuse_quantized(model, "saving it as an ordinary model would lose them")
    ids = save_tokenizer(directory, tokenizer, stop_ids)
    if isinstance(model, Transformer):
        config = config_json.write(model.args) | {"dtype": str(model.dtype).removeprefix("torch.")} | ids
        config |= quantized.bits_of(model)
        if weights:
            safetensors_files.write_model(directory, config, safetensors_files.state_of(model))
        else:
            (directory / CONFIG).write_text(json.dumps(config, indent=2))
    else:
        transformers_model.save(directory, model, ids)


def save_adapter(
    directory: Path, tree: torch.nn.Module, base: str, tokenizer: Tokenizer, stop_ids: list[int] | None = None
) -> None:
    """Write the adapter of a tree of modules as a PEFT directory that names `base`, with the tokenizer; stop_ids: as in
    `save_model`."""
    peft.save(directory, tree, base=base)
    save_tokenizer(directory, tokenizer, stop_ids)


def save_tokenizer(directory: Path, tokenizer: Tokenizer | None, stop_ids: list[int] | None) -> dict[str, Any]:
    """Write the tokenizer's files and `generation_config.json`; returns the ids of special tokens for `config.json`."""
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        tokenizer.save(directory)
    generation = ids | ({"eos_token_id": stop_ids or tokenizer.eos_id} if ids else {})
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return ids


def kept_dtype(directory: Path) -> torch.dtype:
    """Return the dtype that a model directory keeps its parameters in; ValueError where that is none."""
    config = read_config(directory)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{Path(directory) / CONFIG}: dtype should be float32, bfloat16 or the like, found {name!r}")
    return dtype

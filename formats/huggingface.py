"""Hugging Face directories: the same model in another dtype, or in files of another size.

Weights in safetensors are read, and PyTorch's `.bin` files, of which nothing is executed (checkpoint/pickled_files.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from checkpoint import config_json, quantized
from checkpoint.directory import save_tokenizer
from checkpoint.history import write_origin
from checkpoint.locate import CONFIG, read_config
from checkpoint.safetensors_files import (
    find_tensors,
    has_weights,
    opened,
    read_one,
    second_names,
    state_of,
    weight_files,
)
from checkpoint.streamed import write_streamed
from files import written_aside
from formats.base import FLAG_NAMES, TORCH_DTYPES, Checkpoint, Entries, Entry, Format, as_dtype
from formats.options import Options
from model import Transformer

BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")  # copied as they are
NOT_COPIED = (CONFIG, "*.index.json", "adapter_config.json")


def detect(path: Path) -> bool:
    """Whether a path is a directory with a config.json and weights beside it."""
    return (path / CONFIG).is_file() and has_weights(path)


def read(path: Path) -> Checkpoint:
    """Return the model in a Hugging Face directory.

    Of the LLaMA family, its tensors have to be those of its config.json; of another architecture, they are what they
    are. Raises ValueError where they do not fit, or are quantized.
    """
    config = read_config(path)
    if config.get(quantized.KEY):
        raise ValueError(
            f"{path} holds quantized weights ({quantized.KEY} in config.json), which are not converted: take the model "
            "that they were made of"
        )
    if config.get("model_type", "llama") not in config_json.FAMILY:
        return Checkpoint(path, None, entries_in(weight_files(path)), path, config)
    try:
        args = config_json.read(config)
        with torch.device("meta"):
            model = Transformer(args, initialize=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shapes = {name: tensor.shape for name, tensor in state_of(model).items()}
    found = find_tensors(path, shapes, second_names(model))
    entries = entries_in(set(found.values()))
    ignored = tuple(name for name in found if name not in shapes)
    return Checkpoint(path, args, {name: entries[name] for name in shapes}, path, config, ignored=ignored)


def entries_in(files: Iterable[Path]) -> Entries:
    """Return an entry for every tensor in some files of weights."""
    entries: Entries = {}
    for file in files:
        with opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                stored = weights.get_slice(name)
                read = partial(read_one, file, name)
                entries[name] = Entry(tuple(stored.get_shape()), stored.get_dtype(), (name,), read)
    return entries


def lay_out(checkpoint: Checkpoint, options: Options) -> Entries:
    """Return the entries in the dtype of `--dtype`."""
    if options.dtype == "auto":
        return checkpoint.entries
    return {name: as_dtype(entry, FLAG_NAMES[options.dtype]) for name, entry in checkpoint.entries.items()}


def write(checkpoint: Checkpoint, entries: Entries, out: Path, options: Options) -> None:
    """Write config.json, the weights and the tokenizer."""
    with written_aside(out) as aside:
        if checkpoint.folder is not None:
            config = dict(checkpoint.config)
            copy_beside(checkpoint.folder, aside)
            write_origin(aside, "copy", model=checkpoint.folder)
        else:
            config = config_json.write(checkpoint.family("a Hugging Face directory"))
        if checkpoint.folder is None or checkpoint.tokenizer is not None:
            config |= save_tokenizer(aside, checkpoint.tokenizer, checkpoint.stop_ids)
        if dtypes := {entry.dtype for entry in entries.values() if entry.dtype in TORCH_DTYPES}:
            config.pop("torch_dtype", None)
            widest = max(dtypes, key=lambda name: TORCH_DTYPES[name].itemsize)
            config["dtype"] = str(TORCH_DTYPES[widest]).removeprefix("torch.")
        write_streamed(aside, config, entries, round(options.shard_size * 10**9))


def copy_beside(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, templates and settings of a model directory."""
    for pattern in BESIDE:
        for path in source.glob(pattern):
            if path.is_file() and not any(path.match(each) for each in NOT_COPIED):
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


FORMAT = Format("huggingface", "a Hugging Face directory", detect, read, lay_out, write)

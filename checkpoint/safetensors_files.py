"""The files of weights of a model directory, whatever the model: mapped into memory, written shard by shard.

They are safetensors. PyTorch's `.bin` files (pickled_files.py) and those of a sharded checkpoint (sharded.py) are read,
too; they are not written here. Tensors of safetensors and `.bin` files are views of the mapped file: each part takes
memory when it is first used, and only once. A file is written aside and renamed, so that a model that is still mapped
from the old file keeps its numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from checkpoint.dcp_files import METADATA
from checkpoint.locate import CONFIG, read_config
from checkpoint.pickled_files import PickledFile
from checkpoint.sharded import SUFFIX, NoTensors, ShardedFile, files_of
from files import read_json_object
from model_args import ModelArgs

MAX_SHARD_BYTES = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# one file, and the index of several; the first kind that is there is read, as transformers does
KINDS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of the floating-point dtypes
ANGLES = "rotary_emb.inv_freq"  # rotary buffers in older checkpoints; ignored, because rope_theta determines them

# ---- reading


def has_weights(directory: Path) -> bool:
    """Whether a model directory holds a file of weights, or the index of several."""
    return any((directory / name).is_file() for names in KINDS for name in names) or bool(files_of(directory))


def weight_files(directory: Path) -> list[Path]:
    """Return the paths of a model directory's weights, one file or several.

    Where there is one file with all weights, an index beside it is ignored: it is left from an earlier model in shards.
    Raises FileNotFoundError where any file is missing, and ValueError for an index that names no weights there.
    """
    directory = Path(directory)
    for single, index in KINDS:
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return [directory / name for name in read_index(directory / index, Path(single).suffix)]
    if files := files_of(directory):
        return files
    pickles = [path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in sorted(directory.glob(pattern))]
    if pickles:
        raise FileNotFoundError(
            f"{directory} has no {SINGLE} and no pytorch_model.bin; its {pickles[0]} is a pickle of another layout, "
            "which is not read: convert it with the program that it is from, or take the model's safetensors files"
        )
    raise FileNotFoundError(f"{directory} has no weights: expected {SINGLE} (or pytorch_model.bin)")


def read_index(index: Path, suffix: str) -> list[str]:
    """Return the names of the files that an index of shards names; raises as `weight_files` does."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from tensors to files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise ValueError(f"{index} should name {suffix} files beside it, found {name!r}")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"{index} names {len(names)} files, and {', '.join(missing)} is not there")
    return names


def read_tensors(
    directory: Path, shapes: Mapping[str, torch.Size], tied: Mapping[str, str], elsewhere: Container[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model directory with their names, mapped, on the CPU, in the file's dtype; tied ones once.

    Arguments and errors as of `find_tensors`; the errors are raised before the first tensor is yielded.
    """
    found = find_tensors(directory, shapes, tied, elsewhere)
    for path in sorted(set(found.values())):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if found.get(name) == path and name not in tied:
                    yield name, file.get_tensor(name)


def find_tensors(
    directory: Path, shapes: Mapping[str, torch.Size], tied: Mapping[str, str], elsewhere: Container[str] = ()
) -> dict[str, Path]:
    """Return the file of each tensor of a model directory, by name.

    shapes: name -> shape of every tensor that must be there. tied: second name -> first name of a tied tensor; the
    second may be in the files, too, with the same numbers. elsewhere: names that the caller reads itself. ValueError
    names all that are missing, unknown, of another shape or no floating-point numbers; nothing is skipped silently.
    """
    found: dict[str, Path] = {}
    unknown, misshaped, unusable = [], [], []
    wanted = {**shapes, **{second: shapes[first] for second, first in tied.items()}}
    for path in weight_files(directory):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(ANGLES) or name in elsewhere:
                    continue
                found[name] = path
                stored = file.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if name not in wanted:
                    unknown.append(name)
                elif shape != tuple(wanted[name]):
                    misshaped.append(f"{name} is {shape}, config.json makes it {tuple(wanted[name])}")
                elif dtype not in FLOATS:
                    unusable.append(f"{name} is {dtype}, which needs scales to be read")
    missing = [name for name in shapes if name not in found]
    kinds = {"lacks": missing, "holds, without a place for them in the model,": unknown, "has other shapes:": misshaped}
    kinds["is quantized:"] = unusable
    if faults := [f"{what} {listed(names)}" for what, names in kinds.items() if names]:
        raise ValueError(f"{directory} does not fit its config.json: it {'; it '.join(faults)}")
    for second, first in tied.items():
        if second in found and not torch.equal(*(read_one(found[name], name).float() for name in (first, second))):
            raise ValueError(
                f"{directory} contradicts itself: config.json makes {second} the same as {first}, and the files hold "
                "other numbers for it; set tie_word_embeddings to false there, or remove one of the two"
            )
    return found


def read_one(path: Path, name: str) -> torch.Tensor:
    """Return one tensor of a file, mapped."""
    with opened(path) as file:
        return file.get_tensor(name)


def load(
    make: Callable[[dict[str, Any]], nn.Module], directory: Path, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Build a model and give it the tensors of a directory: `make` builds it from the contents of `config.json`.

    Its parameters are views of the mapped file where dtype and device are the file's. Raises ValueError that names what
    does not fit.
    """
    config = read_config(directory)
    check_depth(config, directory)
    try:
        with torch.device("meta"):  # shapes without memory: the tensors come from the file
            model = make(config).to(dtype)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    own, tied = model.state_dict(), second_names(model)
    state = {name: tensor.to(device, own[name].dtype) for name, tensor in read_into(model, directory)}
    model.load_state_dict(state, strict=False, assign=True)  # strict=False: `read_into` has compared the names
    for second, first in tied.items():  # only the first name of a tied parameter has got its tensor so far
        module, _, name = second.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(first))
    return model


def check_depth(config: dict[str, Any], directory: Path) -> None:
    """Raise ValueError for a config with more layers than there are tensors, before that many modules are built."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1000:
        return
    tensors = 0
    for path in weight_files(directory):
        with opened(path) as file:
            tensors += len(file.keys())
    if layers > tensors:
        raise ValueError(f"{directory} does not fit its config.json: {layers} layers, and {tensors} tensors in all")


def check_size(args: ModelArgs, directory: Path) -> None:
    """Raise ValueError for a shape of far more numbers than the files hold, before a model of it is built."""
    stored = sum(path.stat().st_size for path in weight_files(directory))  # bytes; at most 4 numbers each, in 2 bits
    if args.n_parameters() > max(10**9, 10 * stored):
        raise ValueError(
            f"its config.json makes a model of {args.n_parameters():,} numbers, and its files have {stored:,} bytes"
        )


@torch.no_grad()
def copy_into(model: nn.Module, directory: Path) -> None:
    """Copy a directory's tensors into the parameters that a model has; raises as `read_tensors` does."""
    own = model.state_dict()
    for name, tensor in read_into(model, directory):
        own[name].copy_(tensor)


def read_into(model: nn.Module, directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a directory holds for a model; raises as `read_tensors` does."""
    shapes = {name: tensor.shape for name, tensor in state_of(model).items()}
    return read_tensors(directory, shapes, second_names(model))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Yield a safetensors file, or a file of another kind with the same methods; ValueError when it cannot be read."""
    kinds = {".bin": PickledFile, METADATA: ShardedFile, SUFFIX: NoTensors}  # by the end of the name
    if other := kinds.get(path.suffix or path.name):
        yield other(path)
        return
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors (truncated or damaged): {error}") from None


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by name, tied parameters under their first name only."""
    second = second_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in second}


def second_names(model: nn.Module) -> dict[str, str]:
    """Return second name -> first name of each tied parameter, such as the name of a head that is the embedding."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in every if name != first[parameter]}


def listed(names: Iterable[str]) -> str:
    """Return the first three names as one string for a message, then "and N more" when there are N others."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- writing


def write_model(
    directory: Path,
    config: dict[str, Any],
    state: Mapping[str, torch.Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `config.json` and the tensors: as one file, or above `max_shard_bytes` as shards with an index."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = split({name: tensor.nbytes for name, tensor in state.items()}, max_shard_bytes)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file, names in zip(files, shards):
        aside = directory / f".{file}.writing"
        save_file({name: state[name].contiguous() for name in names}, aside, metadata={"format": "pt"})
        aside.replace(directory / file)
    for path in [*directory.glob("model*.safetensors"), directory / INDEX]:  # remove those of an older model
        if path.name not in files and (path.name in (SINGLE, INDEX) or SHARD.fullmatch(path.name)):
            path.unlink(missing_ok=True)
    if count > 1:
        places = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2))
    (directory / CONFIG).write_text(json.dumps(config, indent=2))


def split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Return the names of tensors in runs of at most `max_bytes` together; a larger tensor makes a run of its own.

    sizes: name -> bytes.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, n_bytes in sizes.items():
        if shards[-1] and size + n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    return shards

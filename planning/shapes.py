"""Where the shape of a model comes from: a published name, a preset, a config.json, a model directory."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.locate import model_in, read_config
from cli.args import as_flags, parse, read_section
from files import read_json_object
from model_args import ModelArgs
from optim.args import OptimArgs
from training.args import TrainArgs


def shape(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_dim: int, **more: Any) -> ModelArgs:
    """Return a shape of LLaMA's vocabulary, without tied embeddings unless `more` says otherwise."""
    defaults = {"vocab_size": 32000, "tie_embeddings": False, "max_seq_len": 4096}
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "hidden_dim": hidden_dim}
    return ModelArgs(**sizes, **defaults | more)


LLAMA3 = {"vocab_size": 128256, "max_seq_len": 8192, "rope_theta": 5e5}
PUBLISHED = {
    "tinyllama": shape(2048, 22, 32, 4, 5632, max_seq_len=2048),
    "smollm2-135m": shape(576, 30, 9, 3, 1536, vocab_size=49152, tie_embeddings=True, max_seq_len=8192),
    "qwen2.5-0.5b": shape(896, 24, 14, 2, 4864, vocab_size=151936, tie_embeddings=True, attention_bias=True),
    "qwen3-8b": shape(4096, 36, 32, 8, 12288, vocab_size=151936, head_dim=128, qk_norm=True, max_seq_len=40960),
    "mistral-7b": shape(4096, 32, 32, 8, 14336),
    "llama2-7b": shape(4096, 32, 32, 32, 11008),
    "llama2-13b": shape(5120, 40, 40, 40, 13824),
    "llama2-70b": shape(8192, 80, 64, 8, 28672),
    "llama3-8b": shape(4096, 32, 32, 8, 14336, **LLAMA3),
    "llama3-70b": shape(8192, 80, 64, 8, 28672, **LLAMA3),
    "llama3-405b": shape(16384, 126, 128, 8, 53248, **LLAMA3),
}


@dataclass(frozen=True)
class Recipe:
    """The parts of a preset's section `pretrain` that a plan reads."""

    model: ModelArgs = field(default_factory=ModelArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    train: TrainArgs = field(default_factory=TrainArgs)


@dataclass(frozen=True)
class Source:
    """A shape, and what its source says of the training."""

    args: ModelArgs
    name: str
    command: str
    """flags that start a training of this model with pretrain.py"""
    seq_len: int | None = None
    """tokens of a row; None: not said"""
    batch_size: int | None = None
    """rows of an optimizer step"""
    recipe: Recipe | None = None
    """the settings of a preset"""
    flags: str = ""
    """further flags of both trainings: what the plan has otherwise than the preset or the scripts"""


def find_shape(source: str) -> Source:
    """Return the shape of a published name, of a preset (.yaml), of a config.json, or of a model directory.

    Raises ValueError or FileNotFoundError, with the names that are known, for anything else.
    """
    path = Path(source)
    if source.lower() in PUBLISHED and not path.exists():
        args = PUBLISHED[source.lower()]
        return Source(args, source.lower(), flags_of_shape(args))
    if path.suffix in (".yaml", ".yml"):
        return from_preset(path)
    if not path.exists():
        raise FileNotFoundError(
            f"--model {source} is neither a file or directory here nor a name in the table; expected a model "
            f"directory, a config.json, a preset such as configs/small.yaml, or one of {', '.join(PUBLISHED)}"
        )
    from checkpoint import config_json  # not at the top: it loads torch, which takes seconds

    directory = path.parent if path.suffix == ".json" else model_in(path)
    config = read_json_object(path) if path.suffix == ".json" else read_config(directory)
    quantization = config.pop("quantization_config", None)  # its shape is that of the whole weights
    name = f"{directory}{' (stored quantized)' * bool(quantization)}"
    try:
        args = config_json.read(config)
    except ValueError as error:
        raise ValueError(f"--model {source}: {error}") from None
    weights = any(any(directory.glob(each)) for each in ("*.safetensors", "pytorch_model*.bin", "sharded/.metadata"))
    return Source(args, name, f"--init_from {shlex.quote(str(directory))}" if weights else flags_of_shape(args))


def from_preset(path: Path) -> Source:
    """Return what the section `pretrain` of a preset says; exits with an error for one that cannot be read."""
    section = read_section(path, "pretrain")
    if "model" not in section:
        raise ValueError(f"{path}: section pretrain has no `model`; expected a preset such as configs/small.yaml")
    own = {name: values for name, values in section.items() if name in ("model", "optim", "train")}
    recipe = parse(Recipe, "pretrain", as_flags(Recipe, own, f"{path}: pretrain"))
    args, data = recipe.model, section.get("data") or {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: pretrain: data should be a mapping, found {data!r:.100}")
    vocabulary = whole(read_section(path, "train_tokenizer"), "vocab_size", f"{path}: train_tokenizer")
    if vocabulary and "vocab_size" not in own["model"]:
        args = args.replace(vocab_size=vocabulary)
    rows = {name: whole(data, name, f"{path}: pretrain: data") for name in ("seq_len", "batch_size")}
    if "max_seq_len" not in own["model"] and rows["seq_len"]:  # the context of a new model is that of its rows
        args = args.replace(max_seq_len=rows["seq_len"])
    return Source(args, str(path), f"--config {path}", recipe=recipe, **rows)


def whole(values: dict[str, Any], name: str, where: str) -> int | None:
    """Return a whole number above 0 of a preset, None where it has none; ValueError, whose subject is `where`, else."""
    value = values.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{where}.{name} should be a whole number above 0, found {value!r:.100}")
    return value


def flags_of_shape(args: ModelArgs) -> str:
    """Return the --model.* flags of a shape; the vocabulary is that of the data's tokenizer."""
    default, skipped = ModelArgs(), ["vocab_size", "multiple_of", "ffn_dim_multiplier"]
    derived = ModelArgs(dim=args.dim, n_heads=args.n_heads, head_dim=args.head_dim)  # from flags that are not given
    skipped += ["head_dim"] * (args.head_dim == args.dim // args.n_heads)
    own = {n: v for n, v in vars(args).items() if n not in skipped and v is not None}
    own = {n: v for n, v in own.items() if n == "head_dim" or v != getattr(default, n) or v != getattr(derived, n)}
    return " ".join(f"--model.{name} {words(value)}" for name, value in own.items())


def words(value: Any) -> str:
    """Return the value of a flag as words of a command; those of a mapping are its keys, each with its value."""
    pairs = value.items() if isinstance(value, dict) else [(value,)]
    return " ".join(shlex.quote(str(each)) for pair in pairs for each in pair)

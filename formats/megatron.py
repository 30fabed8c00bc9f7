"""Checkpoints of Megatron-LM in its `torch` format, cut by tensor (TP) and pipeline (PP) parallelism.

    ROOT/latest_checkpointed_iteration.txt         a number, or "release"
    ROOT/iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt    {"args": Namespace, "model": tensors by name, ...}

A rank of TP has the heads of some groups of `linear_qkv` (for each group its queries, its key, its value), rows of
`linear_fc1` (a part of the gate, then the same part of up) and of the tables, and columns of `linear_proj` and of
`linear_fc2`; norms are whole. A stage of PP counts its layers from 0. Tables have rows of padding. The halves of a
rotation are those of `model.py`. Names are read as Megatron core writes them, with and without Transformer Engine, and
as the older `language_model` did; written with Transformer Engine's. The files are pickles, of which nothing is run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.locate import find_tokenizer
from checkpoint.pickled_files import NAMES, read_training_file
from checkpoint.streamed_pickle import write_pickle
from files import written_aside
from formats.base import FLAG_NAMES, TORCH_DTYPES, Checkpoint, Entries, Entry, Format, as_dtype, check_entries
from formats.megatron_layout import (
    MULTIPLE,
    cut_piece,
    cut_shape,
    join,
    joined_shapes,
    moved,
    names_of_stage,
    ours_of,
    padded,
    target_of,
)
from formats.options import ExportOptions
from model_args import ModelArgs

FILE, LATEST, RANK = "model_optim_rng.pt", "latest_checkpointed_iteration.txt", re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
TOKENIZER = "tokenizer"  # folder that `write` puts beside the ranks; Megatron itself is told where its tokenizer is
SETTINGS = {  # settings that a model of ours has to have
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False,),
    "num_experts": (None, 0),
    "multi_latent_attention": (False,),
    "num_layers_per_virtual_pipeline_stage": (None,),
}


class Place(NamedTuple):
    """Where a tensor lies: the files of all ranks of TP of one stage, and its name in them."""

    files: tuple[Path, ...]
    name: str


# ---- reading


def directory_of(path: Path) -> Path:
    """Return the directory with mp_rank_* that a checkpoint's root names, or `path` itself."""
    latest = path / LATEST
    if not latest.is_file():
        return path
    word = latest.read_text(encoding="utf8", errors="replace").strip()
    return path / (f"iter_{int(word):07d}" if word.isdigit() else word)


def detect(path: Path) -> bool:
    """Whether a directory holds mp_rank_*/model_optim_rng.pt, or names one that does."""
    return (path / LATEST).is_file() or any(path.glob(f"mp_rank_*/{FILE}"))


def read(path: Path) -> Checkpoint:
    """Return the model in a checkpoint. Raises ValueError where ranks are missing or it is no model of our family."""
    directory = directory_of(path)
    stages = ranks(directory)
    settings = read_training_file(stages[0][0]).get("args")
    if not isinstance(settings, argparse.Namespace):
        raise ValueError(f"{stages[0][0]} has no `args`: the settings of the model are not known")
    args = shape_of(vars(settings), stages[0][0])
    places: dict[str, Place] = {}
    first = 0  # layer of the stage
    for files in stages:
        names = {ours_of(name): name for name in flat(read_training_file(files[0]).get("model"), files[0])}
        layers = [int(found[1]) for name in names if (found := re.match(r"decoder\.layers\.(\d+)\.", name))]
        for name, theirs in names.items():
            places.setdefault(moved(name, first), Place(files, theirs))
        first += max(layers, default=-1) + 1
    if args.tie_embeddings:  # the last stage has a copy of the embedding
        places.pop("output_layer.weight", None)
    entries: Entries = {}
    for name, place in places.items():
        if (known := target_of(name)) is None:
            raise ValueError(f"{place.files[0]} has {place.name}, which has no place in a model of the LLaMA family")
        entries |= dict(entries_of(known[0], known[1], place, args, directory))
    check_entries(path, args, entries)
    found = Checkpoint(path, args, entries, notes=padding_note(vars(settings), args))
    roots = [each for each in (path, directory.parent) if (each / LATEST).is_file()]
    found.tokenizer, found.stop_ids = find_tokenizer(*(root / TOKENIZER for root in roots))
    return found


def ranks(directory: Path) -> list[tuple[Path, ...]]:
    """Return the files of each stage of PP, those of all ranks of TP. Raises ValueError where one is missing."""
    found = {}
    for path in sorted(directory.glob(f"mp_rank_*/{FILE}")):
        if match := RANK.fullmatch(path.parent.name):
            found[int(match[2] or 0), int(match[1])] = path
    if not found:
        kind = " It is of the format torch_dist: let Megatron write it with --ckpt-format torch." * any(
            directory.glob("*.distcp")
        )
        raise ValueError(f"{directory} has no mp_rank_*/{FILE}.{kind}")
    n_stages, n_ranks = (max(key[axis] for key in found) + 1 for axis in (0, 1))
    wanted = [(stage, rank) for stage in range(n_stages) for rank in range(n_ranks)]
    if missing := [key for key in wanted if key not in found]:
        stage, rank = missing[0]
        raise ValueError(
            f"{directory} lacks the file of TP rank {rank} and PP stage {stage}; copy the whole checkpoint"
        )
    return [tuple(found[stage, rank] for rank in range(n_ranks)) for stage in range(n_stages)]


def shape_of(settings: dict[str, Any], where: Path) -> ModelArgs:
    """Return the shape in Megatron's arguments; ValueError for settings that a model of ours does not have."""
    for name, values in SETTINGS.items():
        if (value := settings.get(name, values[0])) not in values:
            raise ValueError(f"{where}: a model of the LLaMA family has {name} {values[0]}, found {value}")
    try:
        heads = settings["num_attention_heads"]
        groups = settings.get("num_query_groups") if settings.get("group_query_attention") else heads
        return ModelArgs(
            dim=settings["hidden_size"],
            n_layers=settings["num_layers"],
            n_heads=heads,
            n_kv_heads=groups,
            head_dim=settings.get("kv_channels"),
            hidden_dim=settings["ffn_hidden_size"],
            vocab_size=settings.get("vocab_size") or settings["padded_vocab_size"],
            norm_eps=settings.get("norm_epsilon", settings.get("layernorm_epsilon", 1e-5)),
            rope_theta=float(settings.get("rotary_base", 10000)),
            max_seq_len=settings["max_position_embeddings"],
            tie_embeddings=not settings.get("untie_embeddings_and_output_weights", False),
            attention_bias=bool(settings.get("add_qkv_bias", False)),
            qk_norm=bool(settings.get("qk_layernorm", False)),
        )
    except KeyError as error:
        raise ValueError(f"{where}: `args` lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def flat(state: Any, where: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of nested dicts by their dotted names; states of Transformer Engine are left out."""
    if not isinstance(state, dict):
        raise ValueError(f"{where} has no `model`, or one of virtual pipeline stages, which are not read here")
    found = {}
    for name, value in state.items():
        if torch.is_tensor(value) and not str(name).endswith("_extra_state"):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, dict):
            found |= flat(value, where, f"{prefix}{name}.")
    return found


def entries_of(
    names: tuple[str, ...], cut: str, place: Place, args: ModelArgs, where: Path
) -> Iterator[tuple[str, Entry]]:
    """Yield our name and the entry of each part of a tensor."""
    stored = [flat(read_training_file(file).get("model"), file).get(place.name) for file in place.files]
    if any(each is None or each.dtype not in NAMES for each in stored):
        raise ValueError(f"{where}: {place.name} is missing on a rank, or is no tensor of floating point")
    shapes = joined_shapes([tuple(each.shape) for each in stored], cut, args)
    for number, name in enumerate(names):
        load = partial(load_part, place, cut, number, args)
        yield name, Entry(shapes[number], NAMES[stored[0].dtype], (place.name,), load)


def load_part(place: Place, cut: str, number: int, args: ModelArgs) -> torch.Tensor:
    """Return one part of a tensor from the files of all ranks."""
    pieces = [flat(read_training_file(file)["model"], file)[place.name] for file in place.files]
    return join(pieces, cut, number, args)


def padding_note(settings: dict[str, Any], args: ModelArgs) -> tuple[str, ...]:
    """Return a sentence on rows of padding that cannot be told from the vocabulary."""
    if settings.get("vocab_size"):
        return ()
    return (f"the checkpoint does not say its vocabulary: all {args.vocab_size} rows are kept, padding among them",)


# ---- writing


def lay_out(checkpoint: Checkpoint, options: ExportOptions) -> Entries:
    """Return the entries of all files, under `mp_rank_TT[_PPP]/NAME`; ValueError for sizes that do not divide."""
    args, tp, pp = checkpoint.family("checkpoints of Megatron"), options.tensor_parallel, options.pipeline_parallel
    sizes = {"key and value heads": args.n_kv_heads, "heads": args.n_heads, "feed-forward width": args.hidden_dim}
    for what, size in sizes.items():
        if size % tp:
            raise ValueError(f"--tensor_parallel {tp} does not divide the {size} {what} of {checkpoint.where}")
    if args.n_layers % pp:
        raise ValueError(f"--pipeline_parallel {pp} does not divide the {args.n_layers} layers of {checkpoint.where}")
    if args.rope_scaling or args.sliding_window:
        raise ValueError(f"{checkpoint.where} stretches positions or has a window, for which these files have no place")
    source = checkpoint.entries
    if options.dtype != "auto":
        source = {name: as_dtype(entry, FLAG_NAMES[options.dtype]) for name, entry in source.items()}
    entries: Entries = {}
    for stage in range(pp):
        names = list(names_of_stage(args, stage, pp))
        for rank in range(tp):
            folder = f"mp_rank_{rank:02d}" + f"_{stage:03d}" * (pp > 1)
            for theirs, ours, cut in names:
                if parts := [source[name] for name in ours if name in source]:
                    load = partial(cut_piece, parts, cut, rank, tp, args)
                    shape = cut_shape(parts, cut, tp)
                    entries[f"{folder}/{theirs}"] = Entry(shape, parts[0].dtype, ours, load)
    return entries


def write(checkpoint: Checkpoint, entries: Entries, out: Path, options: ExportOptions) -> None:
    """Write a checkpoint of the iteration "release", one file after the other."""
    folders = list(dict.fromkeys(name.partition("/")[0] for name in entries))
    dtype = TORCH_DTYPES[next(iter(entries.values())).dtype]
    settings = settings_of(checkpoint.family("checkpoints of Megatron"), options, dtype)
    with written_aside(out) as aside:
        for folder in folders:
            own = {name.partition("/")[2]: entry for name, entry in entries.items() if name.startswith(f"{folder}/")}
            (aside / "release" / folder).mkdir(parents=True)
            state = {"args": settings, "checkpoint_version": 3.0, "iteration": 0, "model": own}
            write_pickle(aside / "release" / folder / FILE, state)
        (aside / LATEST).write_text("release")
        if checkpoint.with_tokenizer().tokenizer is not None:
            checkpoint.tokenizer.save(aside / TOKENIZER)


def settings_of(args: ModelArgs, options: ExportOptions, dtype: torch.dtype) -> argparse.Namespace:
    """Return Megatron's arguments that describe the model."""
    return argparse.Namespace(
        num_layers=args.n_layers,
        hidden_size=args.dim,
        ffn_hidden_size=args.hidden_dim,
        num_attention_heads=args.n_heads,
        group_query_attention=args.n_kv_heads != args.n_heads,
        num_query_groups=args.n_kv_heads,
        kv_channels=args.head_dim,
        max_position_embeddings=args.max_seq_len,
        seq_length=args.max_seq_len,
        norm_epsilon=args.norm_eps,
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=args.attention_bias,
        qk_layernorm=args.qk_norm,
        position_embedding_type="rope",
        rotary_base=args.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        untie_embeddings_and_output_weights=not args.tie_embeddings,
        vocab_size=args.vocab_size,
        padded_vocab_size=padded(args.vocab_size, options.tensor_parallel),
        make_vocab_size_divisible_by=MULTIPLE,
        tensor_model_parallel_size=options.tensor_parallel,
        pipeline_model_parallel_size=options.pipeline_parallel,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        iteration=0,
    )


FORMAT = Format("megatron", "a checkpoint of Megatron-LM (mp_rank_*/model_optim_rng.pt)", detect, read, lay_out, write)

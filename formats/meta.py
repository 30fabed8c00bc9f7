"""Meta's checkpoints of LLaMA 1, 2 and 3: `params.json` and `consolidated.NN.pth`, a file for each rank.

A rank of its tensor parallelism has a part of every matrix: of the rows, or of the columns where the outputs of all
ranks are added (wo, w2). The embedding is cut by columns in LLaMA 1 and 2 and by rows in LLaMA 3; norms are whole in
every file. The `.pth` files are pickles, of which only tensors are read (checkpoint/pickled_files.py).
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint.pickled_files import NAMES as DTYPE_NAMES
from checkpoint.pickled_files import PickledFile
from checkpoint.safetensors_files import listed
from checkpoint.streamed_pickle import write_pickle
from cli.progress import say
from files import read_json_object, written_aside
from formats.base import FLAG_NAMES, Checkpoint, Entries, Entry, Format, as_dtype, check_entries, check_used
from formats.meta_names import BACK, NAMES, halves, heads_of, neighbours, translate
from formats.options import ExportOptions
from formats.vocabulary import proto_of
from model_args import ModelArgs
from tokenizer import load_tokenizer

PARAMS, PATTERN = "params.json", "consolidated.*.pth"
IGNORED = ("rope.freqs",)
BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")  # ranks have columns of these; of other matrices, rows
EMBEDDING = "tok_embeddings.weight"
LENGTHS = {10000.0: 2048, 500000.0: 8192}  # theta -> context, which params.json does not state (LLaMA 1 and 3)
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # use_scaled_rope
SCALED |= {"original_max_position_embeddings": 8192}


def detect(path: Path) -> bool:
    """Whether a path is a directory with params.json and consolidated.*.pth."""
    return (path / PARAMS).is_file() and any(path.glob(PATTERN))


# ---- reading


def read(path: Path) -> Checkpoint:
    """Return the model in a directory, and the SentencePiece tokenizer beside it, where there is one."""
    params, files = read_json_object(path / PARAMS), files_of_ranks(path)
    parts = [tensors_of(file) for file in files]
    names = list(parts[0])
    for file, part in zip(files, parts):
        if part.keys() != parts[0].keys():
            odd = sorted(part.keys() ^ parts[0].keys())[0]
            raise ValueError(f"{file} does not belong to {files[0]}: one has {odd} and the other does not")
    if EMBEDDING not in parts[0] or "layers.0.attention.wq.weight" not in parts[0]:
        raise ValueError(f"{files[0]} has no {EMBEDDING} or no layers: it is no checkpoint of LLaMA")
    args = shape_of(params, parts, path)
    entries: Entries = {}
    for name in names:
        if (ours := translate(name, BACK)) is None:
            continue
        axis = axis_of(name, parts, args)
        shape = list(parts[0][name].shape)
        if axis is not None:
            shape[axis] = sum(part[name].shape[axis] for part in parts)
        heads = heads_of(ours, args.n_heads, args.n_kv_heads)
        load = partial(joined, tuple(files), name, axis, heads)
        entries[ours] = Entry(tuple(shape), DTYPE_NAMES[parts[0][name].dtype], (name,), load)
    check_used(path, names, entries, IGNORED)
    if (head := entries.get("lm_head.weight")) and torch.equal(
        head.load(), entries["model.embed_tokens.weight"].load()
    ):
        del entries["lm_head.weight"]  # Meta's files hold a tied head twice
        args = args.replace(tie_embeddings=True)
    check_entries(path, args, entries)
    place = next((each for each in (path, path.parent) if (each / "tokenizer.model").is_file()), None)
    tokenizer = None
    if place is not None:
        try:
            tokenizer = load_tokenizer(place / "tokenizer.model")
        except ValueError:  # Llama 3's tokenizer.model is a list of pieces for tiktoken
            say(f"{place / 'tokenizer.model'} is no SentencePiece model: name the tokenizer.json with --tokenizer")
    if tokenizer is not None:
        tokenizer.begins = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    return Checkpoint(path, args, entries, tokenizer=tokenizer, ignored=IGNORED)


def files_of_ranks(path: Path) -> list[Path]:
    """Return the files of all ranks in their order; FileNotFoundError names the ones that are missing between them."""
    files = sorted(path.glob(PATTERN))
    numbers = [file.name.split(".")[1] for file in files]
    if all(number.isdecimal() for number in numbers):
        names = [f"consolidated.{rank:02d}.pth" for rank in range(int(numbers[-1]) + 1)]
        if missing := [name for name in names if not (path / name).is_file()]:
            raise FileNotFoundError(
                f"{path} has {files[-1].name} but not {listed(missing)}: copy all files of it again"
            )
    return files


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, mapped; ValueError where it holds anything else."""
    state = PickledFile(file).state
    if strange := [name for name, tensor in state.items() if tensor.dtype not in DTYPE_NAMES and name not in IGNORED]:
        raise ValueError(f"{file}: {strange[0]} is of {state[strange[0]].dtype}, which is not read here")
    return state


def axis_of(name: str, parts: list[dict[str, torch.Tensor]], args: ModelArgs) -> int | None:
    """Return the axis along which the parts of a tensor are joined; None where every rank has all of it."""
    if parts[0][name].dim() == 1:
        return None
    if name == EMBEDDING:
        return 0 if parts[0][name].shape[1] == args.dim else 1
    return 1 if name.endswith(BY_COLUMNS) else 0


def joined(files: tuple[Path, ...], name: str, axis: int | None, heads: int | None) -> torch.Tensor:
    """Return a whole tensor from the parts in all files, which are mapped anew, so that pages in use do not add up."""
    if len(files) == 1 or axis is None:
        tensor = tensors_of(files[0])[name]
    else:
        tensor = torch.cat([tensors_of(file)[name] for file in files], axis)
    return tensor if heads is None else halves(tensor, heads)


def shape_of(params: dict[str, Any], parts: list[dict[str, torch.Tensor]], where: Path) -> ModelArgs:
    """Return the shape in a params.json and in the tensors; ValueError where a key is missing or they disagree."""
    first, n = parts[0], len(parts)
    try:
        dim, n_heads = int(params["dim"]), int(params["n_heads"])
        n_kv_heads = int(params.get("n_kv_heads") or n_heads)
        theta = float(params.get("rope_theta", 10000.0))
        embedding = first[EMBEDDING].shape
        rows = embedding[0] * (n if embedding[1] == dim else 1)
        hidden = sum(part["layers.0.feed_forward.w1.weight"].shape[0] for part in parts)
        wanted = hidden_width(dim, int(params.get("multiple_of", 256)), params.get("ffn_dim_multiplier"))
        scaling = SCALED if params.get("use_scaled_rope") else None
        length = int(params.get("max_seq_len") or (131072 if scaling else LENGTHS.get(theta, 4096)))
        if theta == 10000.0 and float(params["norm_eps"]) == 1e-5 and not params.get("max_seq_len"):
            length = 4096  # LLaMA 2; LLaMA 1 has 1e-6
        args = ModelArgs(
            dim=dim,
            n_layers=int(params["n_layers"]),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            vocab_size=rows,
            hidden_dim=hidden,
            norm_eps=float(params["norm_eps"]),
            max_seq_len=length,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings="output.weight" not in first,
        )
    except KeyError as error:
        raise ValueError(f"{where} lacks {error} in {PARAMS} or in its tensors") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where / PARAMS}: {error}") from None
    if hidden != wanted:
        say(f"{where}: {PARAMS} makes the feed-forward {wanted} wide, and the tensors make it {hidden}, which is taken")
    return args


def hidden_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Return the width of the feed-forward as Meta's code computes it."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


# ---- writing


def lay_out(checkpoint: Checkpoint, options: ExportOptions) -> Entries:
    """Return whole tensors by Meta's names; a tied head is written as a copy of the embedding."""
    args = holdable(checkpoint, options.shards)
    entries: Entries = {}
    for ours, entry in checkpoint.entries.items():
        heads = heads_of(ours, args.n_heads, args.n_kv_heads)
        turned = entry if heads is None else entry._replace(load=partial(turn, entry, heads))
        turned = turned._replace(sources=(ours,))
        turned = turned if options.dtype == "auto" else as_dtype(turned, FLAG_NAMES[options.dtype])
        entries[str(translate(ours, NAMES))] = turned
    return entries | ({"output.weight": entries[EMBEDDING]} if args.tie_embeddings else {})


def turn(entry: Entry, heads: int) -> torch.Tensor:
    """Return q or k with its rows in Meta's order."""
    return neighbours(entry.load(), heads)


def holdable(checkpoint: Checkpoint, shards: int) -> ModelArgs:
    """Return the shape; ValueError that names what Meta's code does not compute, or a number of files that does not
    divide it."""
    args = checkpoint.family("a checkpoint of Meta's code")
    odd = {
        "biases on q, k, v": args.attention_bias,
        "qk_norm": args.qk_norm,
        f"a sliding window of {args.sliding_window}": args.sliding_window,
        f"head_dim {args.head_dim} (always dim / n_heads there)": args.head_dim * args.n_heads != args.dim,
        "stretched positions other than those of Llama 3.1": args.rope_scaling not in (None, SCALED),
    }
    if found := [what for what, is_there in odd.items() if is_there]:
        raise ValueError(f"{checkpoint.where} has {', '.join(found)}, which Meta's code does not compute")
    widths = {name: getattr(args, name) for name in ("dim", "n_kv_heads", "hidden_dim", "vocab_size")}
    if left := [f"{name} {width}" for name, width in widths.items() if width % shards]:
        raise ValueError(f"--shards {shards} does not divide {' and '.join(left)}")
    return args


def write(checkpoint: Checkpoint, entries: Entries, out: Path, options: ExportOptions) -> None:
    """Write params.json, the files of all ranks, one after the other, and the SentencePiece model."""
    args = checkpoint.family("a checkpoint of Meta's code")
    llama3 = args.rope_theta == 500000.0  # cuts the embedding by rows
    with written_aside(out) as aside:
        (aside / PARAMS).write_text(json.dumps(params_of(args), indent=2))
        for rank in range(options.shards):
            part = {name: part_of(name, entry, rank, options.shards, llama3) for name, entry in entries.items()}
            write_pickle(aside / f"consolidated.{rank:02d}.pth", part)
        tokenizer = checkpoint.with_tokenizer().tokenizer
        proto = None if tokenizer is None else proto_of(tokenizer)
        if proto is not None:
            (aside / "tokenizer.model").write_bytes(proto.SerializeToString())
        elif tokenizer is not None:
            say("no tokenizer is written: Meta's code reads SentencePiece models, and that of the model is none")


def part_of(name: str, entry: Entry, rank: int, shards: int, llama3: bool) -> Entry:
    """Return what one rank has of a whole tensor."""
    if len(entry.shape) == 1:
        return entry
    axis = 1 if name.endswith(BY_COLUMNS) or (name == EMBEDDING and not llama3) else 0
    shape = tuple(n // shards if i == axis else n for i, n in enumerate(entry.shape))
    return entry._replace(shape=shape, load=lambda: entry.load().chunk(shards, axis)[rank])


def params_of(args: ModelArgs) -> dict[str, Any]:
    """Return a params.json; `multiple_of` and `ffn_dim_multiplier` are such that Meta's code gets the same width."""
    params = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "max_seq_len": args.max_seq_len,
        **dict(zip(("multiple_of", "ffn_dim_multiplier"), width_settings(args.dim, args.hidden_dim))),
    }
    params |= {"use_scaled_rope": True} if args.rope_scaling else {}
    return {key: value for key, value in params.items() if value is not None}


def width_settings(dim: int, hidden: int) -> tuple[int, float | None]:
    """Return `multiple_of` and `ffn_dim_multiplier` with which `hidden_width` is `hidden`."""
    for multiple in (4096, 1024, 256, 64, 32):
        if hidden_width(dim, multiple, None) == hidden:
            return multiple, None
        if hidden_width(dim, multiple, 1.3) == hidden:
            return multiple, 1.3  # LLaMA-2 70B and Llama 3
    multiple = math.gcd(hidden, 2**12)
    width = int(2 * (4 * dim) / 3)
    # the middle of the factors that round up to `hidden`, so that no rounding of the factor leaves them
    return multiple, (hidden - multiple / 2) / width if multiple > 1 else (hidden + 0.5) / width


FORMAT = Format("meta", "a checkpoint of Meta's code (params.json, consolidated.*.pth)", detect, read, lay_out, write)

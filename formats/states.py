"""The tensors of a training program by its own names, and the model that they are.

A file of `torch.save`, and the checkpoints of DeepSpeed and of torch.distributed.checkpoint, hold tensors by name, and
seldom the shape of the model. The names say which program they are from. What they do not say (the number of heads,
the base of the positions) is that of a config.json, or it stands in the source, in a file beside it, or in flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from checkpoint import config_json
from checkpoint.locate import CONFIG, find_tokenizer, read_config
from checkpoint.pickled_files import NAMES as DTYPE_NAMES
from files import read_json_object
from formats.base import Checkpoint, Entries, Entry, check_entries, check_used
from formats.meta_names import BACK, halves, heads_of, translate
from formats.options import ImportOptions
from model_args import ModelArgs

# what torch.compile, Fabric, FSDP and recomputed blocks put into names
WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
IGNORED = ("freqs_cos", "freqs_sin", "freqs_cis", "pos_cis", "rope.freqs", "mask", "inv_freq", "cos", "sin")  # ends
LIT = {  # lit-gpt's names -> ours; q, k and v are one matrix there
    "lm_head.weight": "lm_head.weight",
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.h.N.norm_1.weight": "model.layers.N.input_layernorm.weight",
    "transformer.h.N.attn.proj.weight": "model.layers.N.self_attn.o_proj.weight",
    "transformer.h.N.norm_2.weight": "model.layers.N.post_attention_layernorm.weight",
    "transformer.h.N.mlp.fc_1.weight": "model.layers.N.mlp.gate_proj.weight",
    "transformer.h.N.mlp.fc_2.weight": "model.layers.N.mlp.up_proj.weight",
    "transformer.h.N.mlp.proj.weight": "model.layers.N.mlp.down_proj.weight",
    "transformer.ln_f.weight": "model.norm.weight",
}
# lit-gpt's settings that ours does not compute -> the values with which they change nothing
LIT_NEUTRAL = {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "scale_embeddings": False}
LIT_NEUTRAL |= {"n_expert": 0, "sliding_window_size": None, "attention_logit_softcapping": None}
BESIDE = ("params.json", "config.json", "lit_config.json", "model_config.yaml")


class Kind(NamedTuple):
    """Programs whose tensors are known by a name."""

    title: str
    known_by: str
    settings: dict[str, float]  # what the small ones among them have, where nothing says otherwise


KINDS = (
    Kind("lit-gpt", "transformer.h.0.mlp.fc_1.weight", {}),
    Kind(
        "llama2.c, baby-llama2 or another with Meta's names",
        "layers.0.attention.wq.weight",
        {"norm_eps": 1e-5, "rope_theta": 10000.0},
    ),
    Kind(
        "minimind or another with Hugging Face's names",
        "model.layers.0.self_attn.q_proj.weight",
        {"norm_eps": 1e-6, "rope_theta": 1e6},
    ),
)
SETTINGS = {  # ours -> the names that other programs have for it
    "n_heads": ("n_heads", "n_head", "num_attention_heads"),
    "norm_eps": ("norm_eps", "rms_norm_eps"),
    "rope_theta": ("rope_theta", "rope_base"),
    "max_seq_len": ("max_seq_len", "block_size", "max_position_embeddings"),
}


class Stored(NamedTuple):
    """A tensor of a source that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    def equals(self, other: Stored) -> bool:
        """Whether both hold the same numbers."""
        return self.shape == other.shape and torch.equal(self.load(), other.load())


@dataclass(frozen=True)
class State:
    """What a source holds, by the names of its program."""

    where: Path
    """file or directory, for messages"""
    tensors: dict[str, Stored]
    folders: tuple[Path, ...]
    """directories in which config.json, other settings and the tokenizer may lie, the nearest first"""
    settings: dict[str, Any] = field(default_factory=dict)
    """what the source itself says of the model, by the names of its program"""
    assume: bool = False
    """whether settings that nothing says are those of small programs; else they are asked for"""
    notes: tuple[str, ...] = ()


def read_state(source: State, options: ImportOptions) -> Checkpoint:
    """Return the model that the tensors of a source are.

    Raises ValueError where they are of no known program, something about the model has to be said, or they do not fit.
    """
    state = {without_wrappers(name): tensor for name, tensor in source.tensors.items()}
    odd = [name for name, each in state.items() if each.dtype not in DTYPE_NAMES and not name.endswith(IGNORED)]
    if odd:
        raise ValueError(f"{source.where}: {odd[0]} is of {state[odd[0]].dtype}, which is not read here")
    kind = kind_of(state, source.where)
    like = options.like.parent if options.like and options.like.is_file() else options.like
    folders = (like,) if like else source.folders
    args, note = shape_in_config(folders, like, options), ()
    if args is None:
        settings = read_settings(source.settings, folders, source.where) | options.known()
        args, note = shape_of(state, kind, settings, source)
    entries = entries_of(state, args, source.where)
    check_used(source.where, state, entries, tuple(name for name in state if name.endswith(IGNORED)))
    if args.tie_embeddings:
        entries.pop("lm_head.weight", None)
    check_entries(source.where, args, entries)
    tokenizer, stop_ids = find_tokenizer(*folders)
    return Checkpoint(source.where, args, entries, tokenizer=tokenizer, stop_ids=stop_ids, notes=(*note, *source.notes))


def without_wrappers(name: str) -> str:
    """Return a name without what wrappers put into it."""
    name = WRAPPER.sub("", name)
    while name.startswith("module."):  # DDP, DeepSpeed
        name = WRAPPER.sub("", name.removeprefix("module."))
    return name


def weights_among(names: Iterable[str]) -> dict[str, str]:
    """Return the names of a model's weights among those of a whole training state: by the program -> in the source.

    The weights may lie under a name of their own, such as `model.`; {} where there are none of a known program.
    """
    clean = {without_wrappers(name): name for name in names}
    roots = [name.removesuffix(kind.known_by) for kind in KINDS for name in clean if name.endswith(kind.known_by)]
    if not roots:
        return {}
    root = min(roots, key=len)
    others = () if root else ("optimizer.", "optim.", "lr_scheduler.", "train_state.", "dataloader.")
    return {
        name.removeprefix(root): clean[name] for name in clean if name.startswith(root) and not name.startswith(others)
    }


def kind_of(state: dict[str, Stored], where: Path) -> Kind:
    """Return the kind of program that a state is of; ValueError with the reason where it is none that is a LLaMA."""
    if "transformer.wpe.weight" in state:
        raise ValueError(
            f"{where} is a GPT-2 of nanoGPT, with learnt absolute positions (transformer.wpe), LayerNorm and GELU. A "
            "LLaMA has rotary positions, RMSNorm and SwiGLU, and no conversion makes one of the other: train on its "
            "data, which convert.py data reads"
        )
    for kind in KINDS:
        if kind.known_by in state:
            return kind
    names = ", ".join(list(state)[:3])
    raise ValueError(
        f"{where} is of no program that is known here ({', '.join(k.title for k in KINDS)}): it has {names}"
    )


# ---- shape


def shape_in_config(folders: tuple[Path, ...], like: Path | None, options: ImportOptions) -> ModelArgs | None:
    """Return the shape in the first Hugging Face config.json of some directories; None where none is of our family.

    Raises FileNotFoundError where `like`, the directory that the user named, has none, and ValueError where it holds
    another model, or the user says what it says.
    """
    for folder in folders:
        if folder != like and not (folder / CONFIG).is_file():
            continue
        config = read_config(folder)
        if config.get("model_type") in config_json.FAMILY:
            if known := options.known():
                raise ValueError(f"--{next(iter(known))} has no effect: {folder / CONFIG} says it; remove it")
            try:
                return config_json.read(config)
            except ValueError as error:
                raise ValueError(f"{folder / CONFIG}: {error}") from None
    return None


def read_settings(own: dict[str, Any], folders: tuple[Path, ...], where: Path) -> dict[str, Any]:
    """Return what a source (`own`) and the files beside it say of the shape, by our names.

    Raises ValueError for a setting of lit-gpt that ours does not compute.
    """
    for place in (folder / name for folder in folders for name in BESIDE):
        if place.is_file():
            found = yaml.safe_load(place.read_text("utf8")) if place.suffix == ".yaml" else read_json_object(place)
            own = (found if isinstance(found, dict) else {}) | own
    for key, neutral in LIT_NEUTRAL.items():
        if own.get(key, neutral) not in (neutral, None):
            raise ValueError(f"{where}: its settings have {key} {own[key]!r}, which ours does not compute")
    values = {ours: next((own[name] for name in names if own.get(name)), None) for ours, names in SETTINGS.items()}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def shape_of(
    state: dict[str, Stored], kind: Kind, settings: dict[str, Any], source: State
) -> tuple[ModelArgs, tuple[str, ...]]:
    """Return the shape that tensors and settings make, and a note on what was assumed."""
    where, wanted = source.where, {"n_heads", "norm_eps", "rope_theta", "max_seq_len"}
    normed = state.get("model.layers.0.self_attn.q_norm.weight")
    if normed is not None:  # its length is that of a head
        settings["n_heads"] = state[kind.known_by].shape[0] // normed.shape[0]
    assumed = {n: value for n, value in kind.settings.items() if n not in settings} if source.assume else {}
    settings = assumed | settings
    if missing := sorted(wanted - settings.keys()):
        flags = " and ".join(f"--{name}" for name in missing)
        raise ValueError(
            f"{where}, of {kind.title}, does not say everything about its model: add {flags}, or --like DIR with a "
            "config.json of the same shape"
        )
    names = {ours: tensor for name, tensor in state.items() if (ours := our_name(name))}
    embedding, n_heads = names["model.embed_tokens.weight"], int(settings["n_heads"])
    rows, kv_rows = rows_of_q_and_k(state, names, n_heads, where)
    head = names.get("lm_head.weight")
    try:
        args = ModelArgs(
            dim=embedding.shape[1],
            n_layers=1 + max(int(name.split(".")[2]) for name in names if name.startswith("model.layers.")),
            n_heads=n_heads,
            n_kv_heads=max(1, kv_rows // (rows // n_heads)),
            head_dim=rows // n_heads,
            vocab_size=embedding.shape[0],
            hidden_dim=names["model.layers.0.mlp.gate_proj.weight"].shape[0],
            norm_eps=float(settings["norm_eps"]),
            rope_theta=float(settings["rope_theta"]),
            max_seq_len=int(settings["max_seq_len"]),
            tie_embeddings=head is None or head.equals(embedding),
            qk_norm=normed is not None,
        )
    except (ValueError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from None
    note = f"{where} is read as a model of {kind.title}"
    if assumed:
        said = " and ".join(f"{name} {value:g}" for name, value in assumed.items())
        note += f" with {said}, which it does not say; --{next(iter(assumed))} and the like say otherwise"
    return args, (note,)


def rows_of_q_and_k(state: dict[str, Stored], names: dict[str, Stored], n_heads: int, where: Path) -> tuple[int, int]:
    """Return the rows of q and of k; in lit-gpt's one matrix, k and v have the rows that q leaves."""
    q, k = (names.get(f"model.layers.0.self_attn.{x}_proj.weight") for x in "qk")
    if q is not None and k is not None:
        rows, kv_rows = q.shape[0], k.shape[0]
    else:
        rows = names["model.layers.0.self_attn.o_proj.weight"].shape[1]
        whole = next(t.shape[0] for name, t in state.items() if name.endswith(("attn.attn.weight", "attn.qkv.weight")))
        kv_rows = (whole - rows) // 2
    if rows % n_heads or not 0 < kv_rows <= rows or kv_rows % (rows // n_heads):
        raise ValueError(f"{where}: q has {rows} rows and k {kv_rows}, and {n_heads} heads do not fit: see --n_heads")
    return rows, kv_rows


# ---- tensors


def entries_of(state: dict[str, Stored], args: ModelArgs, where: Path) -> Entries:
    """Return an entry for each tensor of ours; ValueError for one whose rows the heads do not divide."""
    entries: Entries = {}
    for name, tensor in state.items():
        for ours, change in targets_of(name, args):
            try:
                shape = tuple(change(torch.empty(tensor.shape, device="meta")).shape)
            except RuntimeError:
                raise ValueError(
                    f"{where}: {name} has the shape {tensor.shape}, which {args.n_heads} heads of {args.head_dim} and "
                    f"{args.n_kv_heads} key heads do not divide"
                ) from None
            entries[ours] = Entry(shape, DTYPE_NAMES[tensor.dtype], (name,), partial(changed, tensor, change))
    return entries


def changed(tensor: Stored, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Read a tensor; return ours."""
    return change(tensor.load())


def our_name(name: str) -> str | None:
    """Return our name of a tensor that is one of ours; None for another."""
    return translate(name, BACK) or translate(name, LIT) or (name if name.startswith(("model.", "lm_head")) else None)


def targets_of(name: str, args: ModelArgs) -> list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Return our names for a tensor, each with the function that makes ours of it; none for a table."""
    if name.endswith(IGNORED):
        return []
    if name.endswith(("attn.attn.weight", "attn.qkv.weight")):
        grouped = name.endswith("attn.attn.weight")
        layer = f"model.layers.{name.split('.')[2]}.self_attn"
        return [(f"{layer}.{x}_proj.weight", partial(part_of_qkv, args, grouped, x)) for x in "qkv"]
    ours = our_name(name)
    if ours is None:
        return []
    heads = heads_of(ours, args.n_heads, args.n_kv_heads) if translate(name, BACK) else None  # Meta's order of rows
    return [(ours, partial(with_halves, heads))]


def with_halves(heads: int | None, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with its rows in our order."""
    return tensor if heads is None else halves(tensor, heads)


def part_of_qkv(args: ModelArgs, grouped: bool, x: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return q, k or v of lit-gpt's matrix: all of q, then k, then v; in files of before 2025 (`grouped`) for each key
    head its query heads, then k, then v."""
    per, D = args.n_heads // args.n_kv_heads, args.head_dim
    if not grouped:
        sizes = [args.n_heads * D, args.n_kv_heads * D, args.n_kv_heads * D]
        return tensor.split(sizes)["qkv".index(x)]
    groups = tensor.reshape(args.n_kv_heads, per + 2, D, -1)  # (K, H/K + 2, D, in)
    own = {"q": groups[:, :per], "k": groups[:, per], "v": groups[:, per + 1]}[x]
    return own.reshape(-1, tensor.shape[-1])

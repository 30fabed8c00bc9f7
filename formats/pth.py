"""A model in one `.pth` or `.pt` file: a state of PyTorch as lit-gpt, llama2.c, baby-llama2 and minimind save it.

Such a file holds tensors by name, at its top or under `model`; of optimizers beside them nothing is read. Their names
say which program it is from. What the tensors do not say (the number of heads, the base of the positions) stands in a
file beside it, in the file itself, or comes from flags. Nothing of a pickle is executed (checkpoint/pickled_files.py).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from checkpoint.locate import has_tokenizer
from checkpoint.pickled_files import NAMES as DTYPE_NAMES
from checkpoint.pickled_files import load_pickle
from files import read_json_object
from formats.base import Checkpoint, Entries, Entry, Format, check_entries, check_used
from formats.meta_names import BACK, halves, heads_of, translate
from formats.options import ImportOptions
from model_args import ModelArgs
from tokenizer import load_tokenizer

INSIDE = ("model", "state_dict", "module", "model_state_dict")  # keys under which the tensors may be
PREFIXES = ("_forward_module.", "_orig_mod.", "module.")  # of wrappers: Fabric, torch.compile, DDP
IGNORED = ("freqs_cos", "freqs_sin", "pos_cis", "rope.freqs", "mask", "inv_freq", "cos", "sin")  # ends of names
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
    """A program whose files are known by a tensor's name."""

    title: str
    known_by: str
    settings: dict[str, float]  # what its programs have, where nothing says otherwise


KINDS = (
    Kind("lit-gpt", "transformer.h.0.mlp.fc_1.weight", {}),
    Kind("llama2.c or baby-llama2", "layers.0.attention.wq.weight", {"norm_eps": 1e-5, "rope_theta": 10000.0}),
    Kind("minimind", "model.layers.0.self_attn.q_proj.weight", {"norm_eps": 1e-6, "rope_theta": 1e6}),
)
SETTINGS = {  # ours -> the names that other programs have for it
    "n_heads": ("n_heads", "n_head", "num_attention_heads"),
    "norm_eps": ("norm_eps", "rms_norm_eps"),
    "rope_theta": ("rope_theta", "rope_base"),
    "max_seq_len": ("max_seq_len", "block_size", "max_position_embeddings"),
}


def detect(path: Path) -> bool:
    """Whether a path is a file of `torch.save`, or a directory with lit-gpt's lit_model.pth."""
    path = path / "lit_model.pth" if path.is_dir() else path
    if not path.is_file():
        return False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"  # a pickle of protocol 2: PyTorch before 1.6


def read(path: Path, options: ImportOptions) -> Checkpoint:
    """Return the model in a file; ValueError where it is of no known program, or something about it has to be said."""
    file = path / "lit_model.pth" if path.is_dir() else path
    content = load_pickle(file)
    inside, state = state_of(content, file)
    kind = kind_of(state, file)
    settings = read_settings(content, file) | dict(options.known())
    args, notes = shape_of(state, kind, settings, file)
    entries: Entries = {}
    for name, tensor in state.items():
        for ours, change in targets_of(name, args):
            shape = tuple(change(tensor).shape)
            entries[ours] = Entry(shape, DTYPE_NAMES[tensor.dtype], (name,), partial(load, file, inside, name, change))
    check_used(file, state, entries, tuple(name for name in state if name.endswith(IGNORED)))
    embedding = entries["model.embed_tokens.weight"]
    if args.tie_embeddings:
        entries.pop("lm_head.weight", None)
    elif embedding.shape != entries["lm_head.weight"].shape:
        raise ValueError(f"{file}: embedding and head have {embedding.shape} and {entries['lm_head.weight'].shape}")
    check_entries(file, args, entries)
    tokenizer = load_tokenizer(file.parent) if has_tokenizer(file.parent) else None
    return Checkpoint(file, args, entries, tokenizer=tokenizer, notes=notes)


def state_of(content: Any, file: Path) -> tuple[str | None, dict[str, torch.Tensor]]:
    """Return the key under which the tensors are (None: at the top) and the tensors by their names in the program."""
    inside = next((key for key in INSIDE if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    found = content[inside] if inside else content
    tensors = {k: v for k, v in found.items() if torch.is_tensor(v)} if isinstance(found, dict) else {}
    if not tensors:
        raise ValueError(f"{file} holds no tensors by name, neither at its top nor under {', '.join(INSIDE)}")
    state = {without_prefix(name): tensor for name, tensor in tensors.items()}
    odd = [name for name, tensor in state.items() if tensor.dtype not in DTYPE_NAMES and not name.endswith(IGNORED)]
    if odd:
        raise ValueError(f"{file}: {odd[0]} is of {state[odd[0]].dtype}, which is not read here")
    return inside, state


def without_prefix(name: str) -> str:
    """Return a name without the prefixes of wrappers."""
    while prefix := next((each for each in PREFIXES if name.startswith(each)), None):
        name = name.removeprefix(prefix)
    return name


def kind_of(state: dict[str, torch.Tensor], file: Path) -> Kind:
    """Return the program that a state is of; ValueError with the reason where it is none that is a LLaMA."""
    if "transformer.wpe.weight" in state:
        raise ValueError(
            f"{file} is a GPT-2 of nanoGPT, with learnt absolute positions (transformer.wpe), LayerNorm and GELU. A "
            "LLaMA has rotary positions, RMSNorm and SwiGLU, and no conversion makes one of the other: train on its "
            "data, which convert.py data reads"
        )
    for kind in KINDS:
        if kind.known_by in state:
            return kind
    names = ", ".join(list(state)[:3])
    raise ValueError(
        f"{file} is of no program that is known here ({', '.join(k.title for k in KINDS)}): it has {names}"
    )


def read_settings(content: Any, file: Path) -> dict[str, Any]:
    """Return what a file, and the settings beside it, say of the shape, by our names.

    Raises ValueError for a setting of lit-gpt that ours does not compute.
    """
    own = next((content[key] for key in ("model_args", "config", "hparams") if is_mapping(content, key)), {})
    for name in BESIDE:
        place = file.parent / name
        if place.is_file():
            found = yaml.safe_load(place.read_text("utf8")) if place.suffix == ".yaml" else read_json_object(place)
            own = (found if isinstance(found, dict) else {}) | own
    for key, neutral in LIT_NEUTRAL.items():
        if own.get(key, neutral) not in (neutral, None):
            raise ValueError(f"{file}: its settings have {key} {own[key]!r}, which ours does not compute")
    found = {ours: next((own[name] for name in names if own.get(name)), None) for ours, names in SETTINGS.items()}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def is_mapping(content: Any, key: str) -> bool:
    """Whether an object has a mapping under a key."""
    return isinstance(content, dict) and isinstance(content.get(key), dict)


def shape_of(
    state: dict[str, torch.Tensor], kind: Kind, settings: dict[str, Any], file: Path
) -> tuple[ModelArgs, tuple[str, ...]]:
    """Return the shape that tensors and settings make, and a note on what was assumed."""
    wanted = {"n_heads", "norm_eps", "rope_theta", "max_seq_len"}
    normed = state.get("model.layers.0.self_attn.q_norm.weight")
    if normed is not None:  # its length is that of a head
        settings["n_heads"] = len(state[kind.known_by]) // len(normed)
    assumed = {name: value for name, value in kind.settings.items() if name not in settings}
    settings = assumed | settings
    if missing := sorted(wanted - settings.keys()):
        flags = " and ".join(f"--{name}" for name in missing)
        raise ValueError(f"{file}, of {kind.title}, does not say everything about its model: add {flags}")
    names = {ours: tensor for name, tensor in state.items() if (ours := our_name(name))}
    embedding, n_heads = names["model.embed_tokens.weight"], int(settings["n_heads"])
    rows, kv_rows = rows_of_q_and_k(state, names, n_heads, file)
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
            tie_embeddings=head is None or (head.shape == embedding.shape and torch.equal(head, embedding)),
            qk_norm=normed is not None,
        )
    except (ValueError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: {error}") from None
    note = f"{file} is read as a model of {kind.title}"
    if assumed:
        said = " and ".join(f"{name} {value:g}" for name, value in assumed.items())
        note += f" with {said}, which it does not say; --{next(iter(assumed))} and the like say otherwise"
    return args, (note,)


def rows_of_q_and_k(
    state: dict[str, torch.Tensor], names: dict[str, torch.Tensor], n_heads: int, file: Path
) -> tuple[int, int]:
    """Return the rows of q and of k; in lit-gpt's one matrix, k and v have the rows that q leaves."""
    q, k = (names.get(f"model.layers.0.self_attn.{x}_proj.weight") for x in "qk")
    if q is not None and k is not None:
        rows, kv_rows = len(q), len(k)
    else:
        rows = names["model.layers.0.self_attn.o_proj.weight"].shape[1]
        whole = next(len(t) for name, t in state.items() if name.endswith(("attn.attn.weight", "attn.qkv.weight")))
        kv_rows = (whole - rows) // 2
    if rows % n_heads or not 0 < kv_rows <= rows or kv_rows % (rows // n_heads):
        raise ValueError(f"{file}: q has {rows} rows and k {kv_rows}, and {n_heads} heads do not fit: see --n_heads")
    return rows, kv_rows


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


def load(file: Path, inside: str | None, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Read a tensor again from the file, which is mapped anew so that pages in use do not add up; return ours."""
    content = load_pickle(file)
    found = content[inside] if inside else content
    return change(next(tensor for key, tensor in found.items() if without_prefix(key) == name))


FORMAT = Format("pth", "a .pth of lit-gpt, llama2.c, baby-llama2 or minimind", detect, read)

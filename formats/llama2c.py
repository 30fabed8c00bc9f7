"""Files of llama2.c (Karpathy 2023, github.com/karpathy/llama2.c): what its `run.c` and `runq.c` execute.

All numbers are little-endian. Version 0 has no magic: 7 int32 (dim, hidden_dim, n_layers, n_heads,
n_kv_heads, vocab_size, seq_len; vocab_size below 0: the head is not tied), then float32 tensors in the order `ORDER`.
Versions 1 and 2: 256 bytes with "ak42" (as a uint32), the version, the same 7 numbers and a byte that is 1 where the
head is tied; norms first. Version 2 has an int32 behind that byte, the number of weights that share a scale: matrices
are int8 values, then float32 scales.

The programs fix what the header does not say: theta 10000, norm_eps 1e-5, no biases.
"""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from files import files_aside
from formats import llama2c_tokenizer
from formats.base import Checkpoint, Entries, Entry, Format, check_entries
from formats.meta_names import BACK, NAMES, halves, heads_of, neighbours, translate
from formats.options import Options
from model_args import ModelArgs

MAGIC = b"24ka"  # 0x616b3432, "ak42" from the highest byte to the lowest
HEADER = 256  # bytes of the header of versions 1 and 2
THETA, EPS = 10000.0, 1e-5  # of run.c
GROUP = 64  # weights that share a scale in version 2, or half of that, or a quarter ..., as the widths allow
LARGEST = 2**24  # of a number in a header

_MATRICES = [f"layers.N.{name}.weight" for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo")]
_FEED = [f"layers.N.feed_forward.w{i}.weight" for i in (1, 2, 3)]
_NORMS = ["layers.N.attention_norm.weight", "layers.N.ffn_norm.weight"]
_ENDS = ["tok_embeddings.weight", "norm.weight", "output.weight"]
TABLES = ["freqs_cos", "freqs_sin"]  # (seq_len, D/2) each, which run.c skips
ORDER = {  # version -> tensors; with N: those of all layers, one after the other
    0: [_ENDS[0], _NORMS[0], *_MATRICES, _NORMS[1], *_FEED, _ENDS[1], *TABLES, _ENDS[2]],
    1: [*_NORMS, _ENDS[1], _ENDS[0], *_MATRICES, *_FEED, _ENDS[2]],
    2: [*_NORMS, _ENDS[1], _ENDS[0], *_MATRICES, *_FEED, _ENDS[2]],
}


class Header(NamedTuple):
    """What the beginning of a file says."""

    version: int
    args: ModelArgs
    group: int
    start: int  # of the tensors, in bytes


def read_header(path: Path) -> Header:
    """Return what a file's header says; ValueError where it is none of llama2.c."""
    with path.open("rb") as file:
        raw = file.read(HEADER)
    if raw[:4] == MAGIC and len(raw) == HEADER:
        version, *numbers, tied, group = struct.unpack_from("<8iBi", raw, 4)
        if version not in (1, 2):
            raise ValueError(f"{path} is of version {version} of llama2.c's format; versions 0, 1 and 2 are read here")
        return Header(version, shape_of(path, numbers, bool(tied)), group if version == 2 else 1, HEADER)
    if len(raw) < 28:
        raise ValueError(f"{path} is shorter than a header of llama2.c")
    numbers = list(struct.unpack_from("<7i", raw))
    tied, numbers[5] = numbers[5] > 0, abs(numbers[5])
    return Header(0, shape_of(path, numbers, tied), 1, 28)


def shape_of(path: Path, numbers: list[int], tied: bool) -> ModelArgs:
    """Return the shape of the 7 numbers of a header; ValueError where no model has it."""
    if not all(0 < number < LARGEST for number in numbers):
        raise ValueError(f"{path}: the header of llama2.c has 7 numbers above 0, found {numbers}")
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    try:
        return ModelArgs(**dict(zip(names, numbers)), tie_embeddings=tied, norm_eps=EPS, rope_theta=THETA)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def places(header: Header) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return the shape of each tensor and where it begins, in bytes, by llama2.c's names; "" is the end of the file."""
    args, at = header.args, header.start
    shapes = shapes_in_file(args)
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for pattern in ORDER[header.version]:
        if pattern == "output.weight" and args.tie_embeddings:
            continue
        for name in [pattern.replace("N", str(i)) for i in range(args.n_layers)] if "N" in pattern else [pattern]:
            shape = shapes[pattern]
            found[name] = (shape, at)
            size = shape[0] * (shape[1] if len(shape) > 1 else 1)
            int8 = header.version == 2 and len(shape) > 1
            at += size + 4 * (size // header.group) if int8 else 4 * size
    return found | {"": ((), at)}


def shapes_in_file(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by llama2.c's names, N for any layer."""
    q, kv, half = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.head_dim // 2
    outs = {"q_proj": (q, args.dim), "k_proj": (kv, args.dim), "v_proj": (kv, args.dim), "o_proj": (args.dim, q)}
    outs |= {name: (args.hidden_dim, args.dim) for name in ("gate_proj", "up_proj")}
    outs |= {"down_proj": (args.dim, args.hidden_dim), "embed_tokens": (args.vocab_size, args.dim)}
    outs |= {"lm_head": (args.vocab_size, args.dim)}
    shapes = {theirs: outs.get(ours.split(".")[-2], (args.dim,)) for ours, theirs in NAMES.items()}
    return shapes | dict.fromkeys(TABLES, (args.max_seq_len, half))


# ---- reading


def detect(path: Path) -> bool:
    """Whether a file has the magic, or the size that the 7 numbers at its beginning say."""
    if not path.is_file():
        return False
    if path.open("rb").read(4) == MAGIC:
        return True
    return size_said(path) == path.stat().st_size


def is_cut(path: Path) -> bool:
    """Whether the numbers at the beginning of a file are those of a model, and the file ends before they say."""
    return path.is_file() and path.stat().st_size < size_said(path)


def size_said(path: Path) -> int:
    """Return the bytes that the header of a file says; 0 where it is none of llama2.c."""
    try:
        return places(read_header(path))[""][1]
    except (ValueError, ZeroDivisionError, OverflowError):
        return 0


def read(path: Path) -> Checkpoint:
    """Return the model in a file, and the tokenizer in the `tokenizer.bin` beside it."""
    header = read_header(path)
    args, found = header.args, places(header)
    end, size = found.pop("")[1], path.stat().st_size
    if size != end:
        raise ValueError(
            f"{path} should have {end:,} bytes, as its header says, found {size:,}: it is truncated or damaged"
        )
    if header.version == 2 and (header.group < 1 or any(s[-1] % header.group for s, _ in found.values() if len(s) > 1)):
        raise ValueError(f"{path}: groups of {header.group} weights do not divide the rows of its matrices")
    entries: Entries = {}
    for name, (shape, at) in found.items():
        ours = translate(name, BACK)
        if ours is None:
            check_table(path, name, shape, at, args)
            continue
        heads = heads_of(ours, args.n_heads, args.n_kv_heads)
        group = header.group if header.version == 2 and len(shape) > 1 else 0
        entries[ours] = Entry(shape, "F32", (name,), partial(load_tensor, path, shape, at, group, heads))
    check_entries(path, args, entries)
    tokenizer = llama2c_tokenizer.beside(path, args.vocab_size)
    return Checkpoint(path, args, entries, tokenizer=tokenizer, ignored=tuple(TABLES))


def load_tensor(path: Path, shape: tuple[int, ...], at: int, group: int, heads: int | None) -> torch.Tensor:
    """Return a tensor in float32; group: number of int8 weights that share a scale, 0 where the file has float32."""
    size = int(np.prod(shape))
    if group:
        codes = np.fromfile(path, np.int8, size, offset=at)
        scales = np.fromfile(path, "<f4", size // group, offset=at + size)
        weights = (codes.reshape(-1, group) * scales[:, None]).astype(np.float32)
    else:
        weights = np.fromfile(path, "<f4", size, offset=at).astype(np.float32, copy=False)
    tensor = torch.from_numpy(weights.reshape(shape))
    return tensor if heads is None else halves(tensor, heads)


def angles(args: ModelArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables of cosines and sines (seq_len, D/2) as llama2.c computes them, in float32."""
    exponents = torch.arange(0, args.head_dim, 2)[: args.head_dim // 2].float() / args.head_dim
    turned = torch.outer(torch.arange(args.max_seq_len), 1.0 / (THETA**exponents)).float()
    return turned.cos(), turned.sin()


def check_table(path: Path, name: str, shape: tuple[int, ...], at: int, args: ModelArgs) -> None:
    """Raise ValueError where a table of version 0 is none of theta 10000, which run.c computes with."""
    stored = np.fromfile(path, "<f4", int(np.prod(shape)), offset=at).reshape(shape)
    wanted = angles(args)[TABLES.index(name)].numpy()
    if not np.allclose(stored, wanted, atol=1e-3):  # float32 angles of thousands of radians
        raise ValueError(f"{path}: {name} is no table of rotary angles of base {THETA:g}, which llama2.c always has")


# ---- writing


def lay_out(checkpoint: Checkpoint, options: Options, version: int = 0) -> Entries:
    """Return the tensors of a file in its order; each loads as the bytes that are written."""
    args = holdable(checkpoint)
    group = group_of(args)
    entries: Entries = {}
    for name, (shape, _) in places(Header(version, args, group, 0)).items():
        if ours := translate(name, BACK):
            heads = heads_of(ours, args.n_heads, args.n_kv_heads)
            int8 = version == 2 and len(shape) > 1
            load = partial(to_bytes, checkpoint.entries[ours], heads, group if int8 else 0)
            entries[name] = Entry(shape, "Q8_0" if int8 else "F32", (ours,), load)
        elif name:
            entries[name] = Entry(shape, "F32", (), partial(table_bytes, args, TABLES.index(name)))
    return entries


def holdable(checkpoint: Checkpoint) -> ModelArgs:
    """Return the shape; ValueError that names what llama2.c's programs do not compute."""
    args = checkpoint.family("a file of llama2.c")
    odd = {
        "biases on q, k, v": args.attention_bias,
        "qk_norm": args.qk_norm,
        f"a sliding window of {args.sliding_window}": args.sliding_window,
        f"rope_theta {args.rope_theta:g} (always {THETA:g} there)": args.rope_theta != THETA,
        "stretched positions (rope_scaling)": args.rope_scaling,
        f"norm_eps {args.norm_eps:g} (always {EPS:g} there)": args.norm_eps != EPS,
        f"head_dim {args.head_dim} (always dim / n_heads there)": args.head_dim * args.n_heads != args.dim,
    }
    if found := [what for what, is_there in odd.items() if is_there]:
        raise ValueError(f"{checkpoint.where} has {', '.join(found)}, which the programs of llama2.c do not compute")
    return args


def group_of(args: ModelArgs) -> int:
    """Return the number of weights that share a scale: `runq.c` needs groups that divide every row."""
    group = GROUP
    while args.dim % group or args.hidden_dim % group:
        group //= 2
    return group


def to_bytes(entry: Entry, heads: int | None, group: int) -> bytes:
    """Return a tensor as it stands in the file: float32, or with a group int8 values and their float32 scales."""
    weight = entry.load().float()
    if heads is not None:
        weight = neighbours(weight, heads)
    if not group:
        return weight.contiguous().numpy().astype("<f4").tobytes()
    grouped = weight.reshape(-1, group)
    scales = grouped.abs().amax(1, keepdim=True) / 127.0  # (size / group, 1)
    codes = (grouped / torch.where(scales == 0, 1.0, scales)).round().to(torch.int8)
    return codes.numpy().tobytes() + scales.numpy().astype("<f4").tobytes()


def table_bytes(args: ModelArgs, which: int) -> bytes:
    """Return the table of cosines (0) or sines (1) as it stands in the file."""
    return angles(args)[which].numpy().astype("<f4").tobytes()


def write(checkpoint: Checkpoint, entries: Entries, out: Path, options: Options, version: int = 0) -> None:
    """Write a file, and beside it the tokenizer as OUT.tokenizer.bin where llama2.c can hold it."""
    args = holdable(checkpoint)
    vocabulary = llama2c_tokenizer.to_bytes(checkpoint.with_tokenizer().tokenizer)
    paths = [out] + [out.with_name(f"{out.stem}.tokenizer.bin")] * (vocabulary is not None)
    with files_aside(*paths) as aside:
        with aside[0].open("wb") as file:
            file.write(header_bytes(args, version))
            for entry in entries.values():
                file.write(entry.load())
        if vocabulary is not None:
            aside[1].write_bytes(vocabulary)


def header_bytes(args: ModelArgs, version: int) -> bytes:
    """Return the header of a file."""
    numbers = [
        args.dim,
        args.hidden_dim,
        args.n_layers,
        args.n_heads,
        args.n_kv_heads,
        args.vocab_size,
        args.max_seq_len,
    ]
    if version == 0:
        numbers[5] *= 1 if args.tie_embeddings else -1
        return struct.pack("<7i", *numbers)
    header = MAGIC + struct.pack("<8iB", version, *numbers, args.tie_embeddings)
    header += struct.pack("<i", group_of(args)) if version == 2 else b""
    return header.ljust(HEADER, b"\0")


def _format(name: str, version: int, title: str) -> Format:
    only = partial(detect_version, version=version)
    layout: Any = partial(lay_out, version=version)
    return Format(name, title, only, read, layout, partial(write, version=version))


def detect_version(path: Path, version: int) -> bool:
    """Whether a file is of llama2.c and of this version; the version 1 stands for unknown ones, too."""
    if not detect(path):
        return False
    try:
        return read_header(path).version == version
    except ValueError:
        return version == 1


FORMATS = (
    _format("llama2c", 0, "a .bin of llama2.c, version 0 (run.c)"),
    _format("llama2c_v1", 1, "a .bin of llama2.c, version 1"),
    _format("llama2c_q8", 2, "a .bin of llama2.c, version 2 (runq.c, 8 bits)"),
)

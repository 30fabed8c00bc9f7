"""GGUF, version 3: the files of llama.cpp, Ollama and others, written and read with the `gguf` library.

A file holds metadata by key (the shape, the tokenizer, the chat template) and tensors. llama.cpp's architecture `llama`
has the rows of q and k in Meta's order (meta_names.py), `qwen2` and `qwen3` in that of Hugging Face.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli.extras import install_command
from cli.progress import say
from files import files_aside
from formats import gguf_quants, gguf_settings, gguf_tokenizer, modelfile
from formats.base import FLAG_NAMES, TORCH_DTYPES, Checkpoint, Entries, Entry, Format, check_entries, check_used
from formats.gguf_settings import FREQUENCIES, Field
from formats.meta_names import halves, heads_of, neighbours, translate
from formats.options import Options

MAGIC = b"GGUF"
NAMES = {  # ours -> GGUF's; N stands for the number of the layer
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.N.input_layernorm.weight": "blk.N.attn_norm.weight",
    **{
        f"model.layers.N.self_attn.{x}_proj.{kind}": f"blk.N.attn_{x}.{kind}"
        for x in "qkv"
        for kind in ("weight", "bias")
    },
    **{f"model.layers.N.self_attn.{x}_norm.weight": f"blk.N.attn_{x}_norm.weight" for x in "qk"},
    "model.layers.N.self_attn.o_proj.weight": "blk.N.attn_output.weight",
    "model.layers.N.post_attention_layernorm.weight": "blk.N.ffn_norm.weight",
    **{f"model.layers.N.mlp.{x}_proj.weight": f"blk.N.ffn_{x}.weight" for x in ("gate", "up", "down")},
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BACK = {theirs: ours for ours, theirs in NAMES.items()}
KINDS = FLAG_NAMES | {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k": "Q4_K"}  # values of --dtype -> types of GGUF
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 14, "BF16": 32}  # general.file_type
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def library() -> Any:
    """Return the `gguf` library; ValueError with the command that installs it where it is missing."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            f"GGUF files need the package gguf, which is not installed: {install_command('gguf')}"
        ) from None
    return gguf


# ---- reading


def detect(path: Path) -> bool:
    """Whether a file begins with the magic of GGUF."""
    return path.is_file() and path.open("rb").read(4) == MAGIC


class Stored:
    """A tensor of a file that is not read yet."""

    def __init__(self, path: Path, tensor: Any) -> None:
        self.path, self.kind = path, tensor.tensor_type
        self.shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        self.at, self.bytes = int(tensor.data_offset), int(tensor.n_bytes)

    def load(self, heads: int | None = None) -> torch.Tensor:
        """Return the tensor, in its float dtype, or in float32 where it is quantized.

        heads: number of heads whose rows are in Meta's order; None: no rows have to change places.
        """
        raw = np.fromfile(self.path, np.uint8, self.bytes, offset=self.at)  # not mapped: pages in use would add up
        if self.dtype == "BF16":
            tensor = torch.from_numpy(raw).view(torch.bfloat16).reshape(self.shape)
        elif self.dtype in ("F64", "F16") or self.kind.name == "F32":
            tensor = torch.from_numpy(raw).view(TORCH_DTYPES[self.dtype]).reshape(self.shape)
        else:
            block, size = library().GGML_QUANT_SIZES[self.kind]
            rows = raw.reshape(*self.shape[:-1], self.shape[-1] // block * size)
            tensor = torch.from_numpy(library().quants.dequantize(rows, self.kind)).reshape(self.shape)
        return tensor if heads is None else halves(tensor, heads)

    @property
    def dtype(self) -> str:
        """Name of the dtype of `load`."""
        return self.kind.name if self.kind.name in ("F64", "F32", "F16", "BF16") else "F32"


def read(path: Path) -> Checkpoint:
    """Return the model in a file, or in the parts of one (-00001-of-00003.gguf), and its tokenizer."""
    fields, stored = read_parts(path)
    if fields.get("general.type") == "adapter":
        raise ValueError(f"{path} is an adapter, not a model: use the PEFT directory that it was made of")
    factors = stored.pop(FREQUENCIES).load().float() if FREQUENCIES in stored else None
    if "token_embd.weight" not in stored:
        raise ValueError(f"{path} has no tensor token_embd.weight: it is not a whole model")
    tied = "output.weight" not in stored
    args = gguf_settings.read(fields, path, stored["token_embd.weight"].shape[0], tied, factors)
    permuted = fields["general.architecture"] == "llama"
    entries: Entries = {}
    for name, tensor in stored.items():
        if (ours := translate(name, BACK)) is None:
            continue
        heads = heads_of(ours, args.n_heads, args.n_kv_heads) if permuted else None
        entries[ours] = Entry(tensor.shape, tensor.dtype, (name,), partial(tensor.load, heads))
    check_used(path, stored, entries)
    check_entries(path, args, entries)
    quantized = sorted({each.kind.name for each in stored.values()} - {"F64", "F32", "F16", "BF16"})
    notes = [f"{path}: weights in {', '.join(quantized)} become float32 numbers"] if quantized else []
    tokenizer, stop_ids = gguf_tokenizer.read(fields, path)
    return Checkpoint(
        path,
        args,
        in_one_dtype(entries),
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        ignored=(FREQUENCIES,),
        notes=tuple(notes),
    )


def in_one_dtype(entries: Entries) -> Entries:
    """Return the entries with the vectors, which GGUF keeps in float32, in the dtype of the matrices, unless that would
    change one of their numbers."""
    matrices = {entry.dtype for entry in entries.values() if len(entry.shape) > 1}
    wanted = matrices.pop() if len(matrices) == 1 else "F32"
    dtype = TORCH_DTYPES[wanted]
    vectors = {name for name, entry in entries.items() if len(entry.shape) == 1}
    kept = set() if all(holds(dtype, entries[name].load()) for name in vectors) else vectors
    return {
        name: entry if name in kept else entry._replace(dtype=wanted, load=lambda load=entry.load: load().to(dtype))
        for name, entry in entries.items()
    }


def holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether a dtype has every number of a tensor."""
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def read_parts(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return the metadata and the tensors of a file and of the parts that belong to it."""
    parts = [path]
    if SPLIT.search(path.name):
        count = int(path.name[-10:-5])
        parts = [path.with_name(SPLIT.sub(f"-{i:05d}-of-{count:05d}.gguf", path.name)) for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(f"{path} is one of {len(parts)} parts, and {', '.join(missing)} is not there")
    fields: dict[str, Any] = {}
    stored: dict[str, Stored] = {}
    for part in parts:
        own_fields, own_tensors = read_file(part)
        fields = own_fields | fields
        stored |= own_tensors
    return fields, stored


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return the metadata and the tensors of one file; ValueError where it is damaged."""
    gguf = library()
    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: Stored(path, tensor) for tensor in reader.tensors}
    except IndexError:  # a number is read behind the end
        raise ValueError(
            f"{path} cannot be read as GGUF (truncated): its {size:,} bytes end inside its header"
        ) from None
    except Exception as error:  # what numpy and the library meet in bytes that are not what they should be
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as GGUF (truncated or damaged): {reason}") from None
    if cut := [name for name, each in stored.items() if each.at + each.bytes > size]:
        raise ValueError(f"{path} cannot be read as GGUF: it ends before its tensor {cut[0]} does (truncated)")
    return fields, stored


# ---- writing


def lay_out(checkpoint: Checkpoint, options: Options) -> Entries:
    """Return the tensors of a file in its order; each loads as the array that is written."""
    args = checkpoint.family("a GGUF file")
    gguf_settings.write(args, checkpoint.where)  # raises what llama.cpp does not compute
    permuted = gguf_settings.architecture_of(args) == "llama"
    entries: Entries = {}
    for ours, entry in checkpoint.entries.items():
        name = translate(ours, NAMES)
        if name is None:
            raise ValueError(f"{checkpoint.where} has {ours}, which has no place in a GGUF file")
        wanted = KINDS.get(options.dtype, "F32" if entry.dtype == "F64" else entry.dtype)
        kind = gguf_quants.type_of(name, entry.shape, wanted)
        heads = heads_of(ours, args.n_heads, args.n_kv_heads) if permuted else None
        entries[name] = Entry(entry.shape, kind, (ours,), partial(encoded, entry, kind, heads))
    for sentence in gguf_quants.larger_types(
        {name: each.shape for name, each in entries.items()}, KINDS.get(options.dtype, "F32")
    ):
        say(sentence)
    factors = gguf_settings.frequencies(args)
    if factors is not None:
        entries[FREQUENCIES] = Entry(tuple(factors.shape), "F32", (), factors.numpy)
    return entries


def encoded(entry: Entry, kind: str, heads: int | None) -> np.ndarray:
    """Return a tensor as the array that is written."""
    weight = entry.load().float()
    if heads is not None:
        weight = neighbours(weight, heads)
    if kind == "F16" and float(weight.abs().max()) > 65504:
        raise ValueError(f"{entry.sources[0]} has a number beyond float16: choose another --dtype")
    return gguf_quants.encode(weight.numpy(), kind)


def write(checkpoint: Checkpoint, entries: Entries, out: Path, options: Options) -> None:
    """Write a file; beside it OUT.Modelfile for Ollama, where the chat template can be said in Ollama's language."""
    args = checkpoint.family("a GGUF file")
    tokenizer = checkpoint.with_tokenizer().tokenizer
    fields = {
        "general.name": Field("string", out.stem),
        "general.quantization_version": Field("uint32", 2),
        "general.file_type": Field("uint32", FILE_TYPES[most_used(entries)]),
        **gguf_settings.write(args, checkpoint.where),
        **gguf_tokenizer.write(tokenizer, args.vocab_size, checkpoint.stop_ids, checkpoint.where),
    }
    text = modelfile.write(tokenizer, out.name)
    paths = [out] + [out.with_name(f"{out.stem}.Modelfile")] * (text is not None)
    with files_aside(*paths) as aside:
        write_file(aside[0], gguf_settings.architecture_of(args), fields, entries)
        if text is not None:
            aside[1].write_text(text, encoding="utf8")


def most_used(entries: Entries) -> str:
    """Return the type of most of the numbers."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + int(np.prod(entry.shape))
    return max(sizes, key=lambda kind: sizes[kind])


def write_file(path: Path, architecture: str, fields: dict[str, Field], entries: Entries) -> None:
    """Write a GGUF file, one tensor after the other."""
    gguf = library()
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, field in fields.items():
            getattr(writer, f"add_{field.kind}")(key, field.value)
        for name, entry in entries.items():
            kind = gguf.GGMLQuantizationType[entry.dtype]
            size = gguf_quants.n_bytes(entry.shape, entry.dtype)
            numbers = {"F32": np.float32, "F16": np.float16}.get(entry.dtype)
            shape = entry.shape if numbers else (*entry.shape[:-1], size // int(np.prod(entry.shape[:-1])))
            writer.add_tensor_info(name, shape, np.dtype(numbers or np.uint8), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, array in arrays(entries):
            writer.write_tensor_data(array)
    finally:
        writer.close()


def arrays(entries: Entries) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the array of each tensor, one in memory at a time."""
    for name, entry in entries.items():
        yield name, np.ascontiguousarray(entry.load())


FORMAT = Format("gguf", "a GGUF file", detect, read, lay_out, write)

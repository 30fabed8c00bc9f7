"""The formats that `convert.py export` writes, and the settings of a conversion. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

FLOATS = ("fp32", "bf16", "fp16")
DTYPES = ("auto", *FLOATS, "q8_0", "q4_0", "q4_k")  # values of --dtype
# name of --format -> the dtypes that it can hold besides auto
EXPORTS = {
    "huggingface": FLOATS,
    "gguf": (*FLOATS, "q8_0", "q4_0", "q4_k"),
    "meta": FLOATS,
    "megatron": FLOATS,
    "llama2c": (),
    "llama2c_v1": (),
    "llama2c_q8": (),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings that the readers and writers of all formats see."""

    dtype: Literal[DTYPES] = "auto"  # type: ignore[valid-type]
    """dtype of the weights that are written; auto: that of the source, or what the format always has. For gguf
    there are also q8_0 (8.5 bits a weight), q4_0 and q4_k (4.5 bits)"""
    shard_size: Annotated[float, (1e-6, 1e6)] = 5.0
    """largest file of a Hugging Face directory, in GB (10^9 bytes)"""
    dry_run: bool = False
    """write nothing; print the map of the tensors: name in the source, name in the target, shape, dtype"""


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Options):
    """What a source may not say of its model."""

    n_heads: Annotated[int | None, (1, 65536)] = None
    """number of query heads, for a .pth that does not say it; None: as the file or one beside it says"""
    norm_eps: Annotated[float | None, (0, 1)] = None
    """epsilon of RMSNorm, likewise"""
    rope_theta: Annotated[float | None, (1, 1e12)] = None
    """base of the rotary encoding, likewise"""
    max_seq_len: Annotated[int | None, (1, 2**24)] = None
    """longest text in tokens, likewise"""

    like: Path | None = None
    """Hugging Face directory (or config.json) of a model of the same shape, such as the one that training began with:
    for a .pth, or a checkpoint of DeepSpeed or FSDP, without a config.json beside it. Its tokenizer is taken, too"""

    def known(self) -> dict[str, int | float]:
        """Return those that are set, by name."""
        values = {name: getattr(self, name) for name in ("n_heads", "norm_eps", "rope_theta", "max_seq_len")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Settings that only some writers have."""

    shards: Annotated[int, (1, 99)] = 1
    """number of files of --format meta, one for each rank of its tensor parallelism"""
    tensor_parallel: Annotated[int, (1, 1024)] = 1
    """ranks of tensor parallelism of --format megatron; they divide the heads and the feed-forward"""
    pipeline_parallel: Annotated[int, (1, 1024)] = 1
    """stages of pipeline parallelism of --format megatron; they divide the layers"""

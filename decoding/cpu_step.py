"""Fast decoding on a CPU: one call of compiled code (cpu_step.cpp) feeds a few tokens through the whole model.

A step of a small model is short: PyTorch spends more time between its operations than in them, and its product of a
matrix and one vector reads weights at half the memory's speed. The compiled step reads the model's parameters in place,
so it needs no memory of its own and sees every change of them. It is compiled at first use, in a few seconds, and kept
in the user's cache directory. When it cannot be used, `stepper` returns None and decoding calls the model itself: the
results are the same to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

import rope
from attention import backends
from attention.cache import KVCache
from cli.progress import say
from cli.record import file_sha256
from decoding.cpu_weights import Weight, in_8_bits, is_read, weight_of
from hardware import cache_folder
from model import Attention, Block, Decoder, FeedForward, Linear, RMSNorm, Transformer
from model_args import ModelArgs
from quant.linear import QuantizedLinear

PLAIN = {Transformer, Decoder, Block, Attention, FeedForward, Linear, RMSNorm, nn.Embedding, nn.ModuleList}
# fields of ModelArgs that cpu_step.cpp supports; all others must have their defaults
KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "hidden_dim", "multiple_of"),
    *("ffn_dim_multiplier", "norm_eps", "max_seq_len", "rope_theta", "rope_scaling", "tie_embeddings"),
    *("attention_bias", "qk_norm", "sliding_window"),
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
# A step of more tokens is limited by arithmetic, where PyTorch is faster: it uses the processor's bfloat16 products.
MOST_TOKENS = {torch.float32: 128, torch.bfloat16: 32, torch.float64: 128}
MOST_TOKENS_QUANTIZED = 1024  # PyTorch would unpack all weights first
FLAGS = ("-O3", "-ffp-contract=off", "-march=native", "-std=c++17", "-shared", "-fPIC")
SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_step.cpp", "cpu_grouped.h", "cpu_vectors.h"))
# the fields of `Layer` in cpu_step.cpp: linear layers, then addresses
LINEAR = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
VECTORS = (
    *("input_layernorm.weight", "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight", "post_attention_layernorm.weight"),
)
# the fields of `Model` in cpu_step.cpp: integers, then norm_eps, then pointers
INTEGERS = (
    *("dtype", "n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"),
    *("window", "slots"),
)
POINTERS = ("layers", "embedding", "norm")
TABLES = ("cos", "sin")

Step = Callable[..., torch.Tensor]


class _Layer(ctypes.Structure):
    """`Layer` in cpu_step.cpp."""

    _fields_ = (*((name, Weight) for name in LINEAR), *((name, ctypes.c_void_p) for name in VECTORS))


class _Model(ctypes.Structure):
    """`Model` in cpu_step.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("norm_eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("head", Weight),
        *((name, ctypes.c_void_p) for name in TABLES),
    )


def stepper(model: Transformer, cache: KVCache) -> Step | None:
    """Return the function `step(runs, past, n, places) -> logits (B, n, V)`, or None where it cannot be used.

    runs: ids to feed to B rows of the cache (places: which, all different; None: its B rows), run i from position
    past[i] on. The logits are those of `model` after the last n ids of each run, float32 or wider; their bits depend
    neither on the other runs nor on how a text is cut into runs. In-place changes of the parameters are seen, replaced
    parameters are not; the tensors of the cache may be replaced. See `supports`.
    """
    if not supports(model, cache):
        return None
    function = compiled_step()
    if function is None:
        return None
    # the struct holds addresses only: everything it points to has to live as long as `step` (`alive`)
    a, weight = model.args, model.embedding.weight
    kept: list[torch.Tensor] = []  # of quantized layers
    layers = (_Layer * a.n_layers)()
    for layer, block in zip(layers, model.model.layers):
        for name in LINEAR:
            setattr(layer, name, weight_of(block.get_submodule(name), kept))
        for name in VECTORS:
            setattr(layer, name, _address(block, name))
    head = weight_of(in_8_bits(model.lm_head) if is_quantized(model) else model.lm_head, kept)
    struct = _Model(
        *(DTYPES[weight.dtype], a.n_layers, a.dim, a.n_heads, a.n_kv_heads, a.head_dim, a.hidden_dim, a.vocab_size),
        *(cache.window or cache.max_len, 0, a.norm_eps),
        *(ctypes.addressof(layers), weight.data_ptr(), model.model.norm.weight.data_ptr()),
        *(head, None, None),
    )
    alive = [layers, kept, [parameter.detach() for parameter in model.parameters()], None]
    out_dtype = torch.promote_types(weight.dtype, torch.float32)

    def fit_tables() -> None:
        """Make rotary tables for all slots of the cache, float32 as the C++ code expects."""
        cos, sin = rope.cos_sin(torch.arange(cache.room), *model.rope.frequencies(0))  # (slots, D/2)
        struct.slots, struct.cos, struct.sin, alive[3] = cache.room, cos.data_ptr(), sin.data_ptr(), (cos, sin)

    def step(
        runs: Sequence[Sequence[int]], past: Sequence[int], n: int = 1, places: Sequence[int] | None = None
    ) -> torch.Tensor:
        rows, batch = cache.keys.shape[1], len(runs)
        places = range(rows) if places is None else places
        lengths = [past_i + len(run) for past_i, run in zip(past, runs)]
        ids = [id for run in runs for id in run]
        check_runs(cache, a.vocab_size, runs=runs, past=past, n=n, places=places)
        cache.reserve(max(lengths))
        if struct.slots != cache.room:
            fit_tables()
        # the runs concatenated, and where each begins
        logits = torch.empty(batch, n, a.vocab_size, dtype=out_dtype)
        starts = list(itertools.accumulate(map(len, runs), initial=0))
        arrays = [(ctypes.c_int64 * len(numbers))(*numbers) for numbers in (starts, past, ids, places)]
        pointers = (cache.keys.data_ptr(), cache.values.data_ptr(), logits.data_ptr())
        function(ctypes.byref(struct), batch, *arrays, rows, n, *pointers, torch.get_num_threads())
        # the compiled code has written keys and values into the cache's tensors
        cache.length = max(cache.length, *lengths)
        return logits

    return step


def check_runs(
    cache: KVCache,
    vocab_size: int,
    *,
    runs: Sequence[Sequence[int]],
    past: Sequence[int],
    n: int,
    places: Sequence[int],
) -> None:
    """Raise ValueError for runs that do not fit: the compiled code checks nothing, and an id or a position out of range
    would read or write foreign memory."""
    rows, max_len = cache.keys.shape[1], cache.max_len
    lowest, highest = min(map(min, runs)), max(map(max, runs))
    last = max(past_i + len(run) for past_i, run in zip(past, runs)) - 1
    right_rows = len(places) == len(runs) == len({*places} & {*range(rows)})
    if min(past) < 0 or last >= max_len or not right_rows:
        raise ValueError(
            f"the cache has {rows} rows of {max_len} tokens, found {len(runs)} runs for the rows {[*places]} "
            f"at positions {min(past)}..{last}"
        )
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"the model has ids 0..{vocab_size - 1}, found {lowest}..{highest}")
    if n > min(map(len, runs)):
        raise ValueError(f"n should be at most {min(map(len, runs))}, the length of the shortest run, found {n}")


def most_tokens(model: Transformer) -> int:
    """Return the number of tokens up to which the compiled step is faster than PyTorch."""
    quantized = isinstance(model, Transformer) and is_quantized(model)
    return MOST_TOKENS_QUANTIZED if quantized else MOST_TOKENS.get(model.dtype, 0)


def is_quantized(model: Transformer) -> bool:
    """Return whether a model has quantized layers."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def supports(model: Transformer, cache: KVCache) -> bool:
    """Return whether the compiled step computes the same as `model` with `cache`.

    It does on a CPU, for an architecture it knows, built of unchanged modules (nothing injected, quantized or hooked),
    with one dtype throughout, a plain cache, and no attention back-end chosen by name.
    """
    if type(model) is not Transformer or type(cache) is not KVCache or backends.in_use() != "auto":
        return False
    weight = model.embedding.weight
    return (
        weight.dtype in DTYPES
        and model.compute_dtype in (None, weight.dtype)
        and all(getattr(model.args, f.name) == f.default for f in fields(ModelArgs) if f.name not in KNOWN)
        and all((type(m) in PLAIN or is_read(m, weight.dtype)) and not is_modified(m) for m in model.modules())
        and all(p.device.type == "cpu" and p.dtype == weight.dtype and p.is_contiguous() for p in model.parameters())
        and cache.rotated
        and cache.keys.device.type == "cpu"
        and cache.keys.dtype == weight.dtype
    )


def is_modified(module: nn.Module) -> bool:
    """Return whether calling the module does anything other than its class defines."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@functools.cache
def compiled_step() -> Callable[..., None] | None:
    """Return `decode_step` of cpu_step.cpp, compiled if necessary; None, with one line on stderr, when that fails.

    None without a line when there is no compiler, or LITTLE_LLAMA_ENGINE=off in the environment.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None or os.environ.get("LITTLE_LLAMA_ENGINE") == "off":
        return None
    try:
        function = ctypes.CDLL(str(_library(compiler))).decode_step
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or error
        say(f"decoding goes without its compiled step: {str(why).strip()[:500]}")
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    # struct, batch; starts, past, tokens, places; rows, last; keys, values, logits; threads
    function.argtypes = [pointer, number, *[pointer] * 4, number, number, *[pointer] * 3, ctypes.c_int]
    function.restype = None
    return function


def _library(compiler: str) -> Path:
    """Return the path of the compiled library in the cache directory; compile it where it is missing or damaged.

    Its name ends in the SHA-256 of its contents: a library that was cut short would end the process when it is used.
    Raises OSError where another user owns the directory, whose code would be run.
    """
    # the first part of its name is a hash of all that its machine code depends on
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = (source.read_text() for source in SOURCES)
    inputs = "".join((*texts, *FLAGS, version, torch.backends.cpu.get_cpu_capability(), _processor()))
    name = f"cpu_step-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}"
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise OSError(f"{cache} belongs to another user: set XDG_CACHE_HOME to a directory of your own")
    cache.chmod(0o700)  # nobody else may put code there
    for library in cache.glob(f"{name}-*.so"):
        if _is_sound(library):
            return library
        library.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:  # two processes may compile at the same time
        output = Path(directory) / "step.so"
        command = [compiler, *FLAGS, str(SOURCES[0]), "-o", str(output)]
        if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:  # Apple's has no OpenMP
            subprocess.run(command, capture_output=True, text=True, check=True)
        output.chmod(0o700)
        with output.open("rb") as file:
            os.fsync(file)  # on the disk before it has its name
        return output.replace(cache / f"{name}-{file_sha256(output)}.so")


def _is_sound(library: Path) -> bool:
    """Return whether a compiled library is this user's own, and has the contents that its name states."""
    status = library.stat()
    own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return own and library.stem.rpartition("-")[2] == file_sha256(library)


def _processor() -> str:
    """Return a text that distinguishes this processor from others that share the cache directory."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _address(block: nn.Module, name: str) -> int | None:
    """Return the address of the parameter `name` of a block; None when the block has no such parameter."""
    part = block
    for step in name.split("."):
        part = getattr(part, step, None)
    return None if part is None else part.data_ptr()

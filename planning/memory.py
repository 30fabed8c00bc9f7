"""Memory of one process, part by part, as the code in this repository takes it.

Parameters, gradients and optimizer states are float32; activations have `Step.dtype` (bf16: 2 bytes). What autograd
saves in a forward pass is counted tensor by tensor, for the eager model (torch.compile saves less). The tests compare
it with `torch.autograd.graph.saved_tensors_hooks`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from model_args import ModelArgs
from optim.args import OPTIMIZERS, OptimArgs
from planning.optimizer import states

BLOCK_LOGITS = 2**23  # logits that exist at a time, as loss.py cuts them
BITS = {  # bits of a stored weight: in 4 bits with quantized scales (0.127), or with a scale and zero for 128 weights
    "fp32": 32.0,
    "bf16": 16.0,
    "int8": 8.0,
    "gptq4": 4 + (16 + 4) / 128,
    "nf4": 4 + 8 / 64 + 32 / (64 * 256),
}
Base = Literal["full", "int8", "nf4"]


@dataclass(frozen=True)
class Adapter:
    """LoRA adapters on attention and feed-forward, and how the frozen weights under them are stored."""

    r: int = 8
    """rank"""
    base: Base = "full"
    """full: in the dtype of the activations; int8 or nf4 (QLoRA)"""


@dataclass(frozen=True)
class Step:
    """What the memory of a training step depends on beside the shape of the model."""

    rows: int = 1
    """rows of a micro-batch"""
    seq_len: int = 2048
    """tokens of a row"""
    dtype: Literal["auto", "fp32", "bf16"] = "bf16"
    """dtype of activations; auto is decided by the device"""
    optimizer: Literal[OPTIMIZERS] = "adamw"  # type: ignore[valid-type]
    """Muon keeps one number for each weight of a matrix in the blocks, AdamW two"""
    galore_rank: int = OptimArgs.galore_rank
    """dimensions in which GaLore sees a gradient"""
    checkpointing: bool = False
    """recompute each block in the backward pass"""
    fused: bool = True
    """attention in one kernel; else the attention matrix is saved"""
    adapter: Adapter | None = None
    """train adapters; None: all weights"""

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 2 if self.dtype == "bf16" else 4


# ---- parameters


def linears(args: ModelArgs) -> dict[str, tuple[int, int]]:
    """Return name -> (in, out) of the linear layers of a block."""
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    attention = {"q": (args.dim, q_dim), "k": (args.dim, kv_dim), "v": (args.dim, kv_dim), "o": (q_dim, args.dim)}
    wide = (args.dim, args.hidden_dim)
    return attention | {"gate": wide, "up": wide, "down": (args.hidden_dim, args.dim)}


def parameters(args: ModelArgs) -> dict[str, int]:
    """Return the parameters by part; a head that is tied to the embedding has none of its own."""
    sizes = {name: rows * columns for name, (rows, columns) in linears(args).items()}
    biases = args.attention_bias * (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    return {
        "embedding": args.vocab_size * args.dim,
        "attention": args.n_layers * (sum(sizes[name] for name in "qkvo") + biases),
        "feed-forward": args.n_layers * sum(sizes[name] for name in ("gate", "up", "down")),
        "norms": args.n_layers * (2 * args.dim + 2 * args.head_dim * args.qk_norm) + args.dim,
        "head": 0 if args.tie_embeddings else args.vocab_size * args.dim,
    }


def matrices(args: ModelArgs) -> int:
    """Return the weights of the linear layers of one block."""
    return sum(rows * columns for rows, columns in linears(args).values())


def trained(args: ModelArgs, adapter: Adapter | None) -> int:
    """Return the number of parameters that are trained."""
    if adapter is None:
        return args.n_parameters()
    return args.n_layers * adapter.r * sum(rows + columns for rows, columns in linears(args).values())


def stored(args: ModelArgs, kind: str, outside: str | None = None) -> float:
    """Return the bytes of the weights when the linear layers of the blocks are stored as `kind`, a key of BITS.

    outside: how embedding, head, norms and biases are stored; None: as `kind`, or bf16 where that is a quantized kind.
    """
    inside = args.n_layers * matrices(args)
    outside = outside or (kind if kind in ("fp32", "bf16") else "bf16")
    scales = 0.0
    if kind == "int8":  # one float32 scale for each output
        scales = 4 * args.n_layers * sum(columns for _, columns in linears(args).values())
    return (inside * BITS[kind] + (args.n_parameters() - inside) * BITS[outside]) / 8 + scales


# ---- what autograd saves


def saved_by_block(args: ModelArgs, step: Step) -> int:
    """Return the bytes that one block saves for its backward pass, without copies of its weights."""
    e, n = step.itemsize, step.rows * step.seq_len
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    whole = step.adapter is None
    # a norm: its input in float32, the normalized input (for the gradient of its weight), its output, 1 / rms
    norm = (4 + e * whole + e) * args.dim + 4
    heads = args.n_heads + args.n_kv_heads
    qk_norm = args.qk_norm * ((4 + e * whole) * (q_dim + kv_dim) + 4 * heads)
    attention = e * 2 * (q_dim + kv_dim)  # q, k, v and the output
    if step.fused:
        attention += 4 * args.n_heads  # the logarithm of the softmax's denominator
    else:
        attention += args.n_heads * step.seq_len * e  # the softmax
    feed_forward = 4 * e * args.hidden_dim  # gate, silu(gate), up, and their product
    low = 0 if whole else e * step.adapter.r * len(linears(args))  # inputs of lora_B
    return n * (2 * norm + qk_norm + attention + feed_forward + low)


def cast_weights(args: ModelArgs, step: Step) -> int:
    """Return the bytes of the copies of one block's trained weights in the dtype of the activations."""
    if step.itemsize == 4:
        return 0
    if step.adapter is not None:
        return step.itemsize * trained(args, step.adapter) // args.n_layers
    norms = 2 * args.dim + 2 * args.head_dim * args.qk_norm
    return step.itemsize * (matrices(args) + norms)  # a bias is added: its copy is not kept


def saved_outside(args: ModelArgs, step: Step) -> int:
    """Return the bytes that embedding, last norm and loss save, and the head's gradient, which the loss computes."""
    e, n, whole = step.itemsize, step.rows * step.seq_len, step.adapter is None
    norm = n * ((4 + e * whole) * args.dim + 4) + (e * args.dim * whole if e < 4 else 0)
    head = 4 * args.vocab_size * args.dim * whole
    hidden, ids = e * n * args.dim, 8 * n * whole  # the gradient of the last hidden states; ids of embeddings
    return norm + hidden + head + ids


def saved_bytes(args: ModelArgs, step: Step) -> int:
    """Return all bytes that autograd holds at the end of a forward pass with its loss, parameters aside."""
    n, e = step.rows * step.seq_len, step.itemsize
    outside = saved_outside(args, step)
    if step.checkpointing:  # only the input of each block
        return args.n_layers * e * n * args.dim + outside
    angles = 4 * step.seq_len * args.head_dim  # cos and sin, float32
    first = 0
    if step.adapter is not None:  # the embedding is frozen: the first block needs no gradient of its input
        first = n * (4 * args.dim + 4) + (3 * e * step.adapter.r * args.dim if e < 4 else 0)
    return args.n_layers * (saved_by_block(args, step) + cast_weights(args, step)) - first + outside + angles


def logits_block(args: ModelArgs, step: Step) -> int:
    """Return the bytes of the logits, of their gradient and of the copy of the head that exist at a time."""
    rows = min(step.rows * step.seq_len, max(64, BLOCK_LOGITS // args.vocab_size))
    narrow = step.itemsize if step.itemsize < 4 else 0
    return rows * args.vocab_size * (4 + narrow) + args.vocab_size * args.dim * narrow


# ---- the whole process


def training(args: ModelArgs, step: Step) -> dict[str, int]:
    """Return the bytes of a training process by part; their sum is the most that it holds at once, about."""
    n_trained, adapter = trained(args, step.adapter), step.adapter
    weights = 4 * args.n_parameters()
    if adapter is not None:
        own = step.dtype
        weights = int(stored(args, own if adapter.base == "full" else adapter.base, own)) + 4 * n_trained
    adapter_rank = None if adapter is None else adapter.r
    moments = states(args, linears(args), step.optimizer, step.galore_rank, adapter_rank)
    saved = saved_bytes(args, step)
    parts = {"weights": weights, "gradients": 4 * n_trained, "optimizer": moments, "activations": saved}
    if step.checkpointing:
        parts["one recomputed block"] = saved_by_block(args, step) + cast_weights(args, step)
    return parts | {"logits, block by block": logits_block(args, step)}


def largest_rows(args: ModelArgs, step: Step, available: float, most: int = 4096) -> int:
    """Return the most rows of a micro-batch with which `training` stays within `available` bytes; 0: not even one."""

    def fits(rows: int) -> bool:
        return sum(training(args, replace(step, rows=rows)).values()) <= available

    low, high = 0, most + 1  # `low` rows fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- decoding


def cache_per_token(args: ModelArgs, kind: str = "bf16") -> float:
    """Return the bytes of keys and values of one token; kind: fp32, bf16, or int8 with a float32 scale for a head."""
    itemsize = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / args.head_dim}[kind]
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * itemsize


def decoding_rate(args: ModelArgs, weights: float, cache: float, bandwidth: float, peak: float, rows: int = 1) -> float:
    """Return the most tokens a second of `rows` texts together: every step reads all weights once, and all caches.

    weights: bytes of all weights; cache: bytes of the cache of one text; bandwidth: bytes a second; peak: operations a
    second, which limit many rows.
    """
    looked_up = 0 if args.tie_embeddings else args.vocab_size * args.dim * (weights / args.n_parameters())
    products = 2 * (args.n_layers * matrices(args) + args.dim * args.vocab_size)
    seconds = max((weights - looked_up + rows * cache) / bandwidth, rows * products / peak)
    return rows / seconds

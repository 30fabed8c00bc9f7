"""The shape of a model, and how far its positions reach, as flags and config.json state them.

This file does not load torch, which takes seconds: `--help` and a mistyped flag are answered at once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

MOST_LAYERS = 10_000  # to build more takes minutes, however small they are
LARGEST_HEAD = 2**16  # the frequencies of all pairs of dimensions are computed one by one


@dataclass(frozen=True)
class ModelArgs:
    """Model size; names as in Meta's LLaMA code.

    Two are equal when the models have the same shape: `multiple_of` and `ffn_dim_multiplier` do not count, because they
    only determine `hidden_dim`.
    """

    dim: int = 160
    """width of the residual stream"""
    n_layers: int = 6
    """number of transformer blocks"""
    n_heads: int = 5
    """number of query heads"""
    n_kv_heads: int | None = None
    """number of key/value heads (grouped-query attention); None: as many as query heads, 1: multi-query"""
    head_dim: int | None = None
    """dimension of a head; None: dim / n_heads"""
    vocab_size: int = 4800
    """rows of the embedding; taken from the tokenizer when training from scratch"""
    hidden_dim: int | None = None
    """width of the feed-forward; None: 8/3 dim, times ffn_dim_multiplier, rounded up to multiple_of"""
    multiple_of: int = dataclasses.field(default=32, compare=False)
    """the feed-forward width is rounded up to a multiple of this"""
    ffn_dim_multiplier: float | None = dataclasses.field(default=None, compare=False)
    """factor that widens the feed-forward (LLaMA-2 70B)"""
    norm_eps: float = 1e-5
    """epsilon of RMSNorm"""
    max_seq_len: int = 256
    """longest text of the model in tokens, stretched positions included"""
    rope_theta: float = 10000.0
    """base of the rotary encoding"""
    rope_scaling: dict[str, bool | int | float | str | list[float]] | None = None
    """how positions are stretched beyond the window first trained on, as config.json writes it; None: not at all"""
    tie_embeddings: bool = True
    """use the embedding as the output head"""
    attention_bias: bool = False
    """biases on q, k, v (Qwen2)"""
    qk_norm: bool = False
    """RMSNorm on each head's q and k (Qwen3)"""
    sliding_window: int | None = None
    """number of tokens back that attention reaches at most (Mistral); None: all of them"""

    def __post_init__(self) -> None:
        """Fill in what is None. Raises ValueError for a value outside its range or a shape that contradicts itself."""
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if not 0 <= self.norm_eps <= 1:
            raise ValueError(f"norm_eps should be a number from 0 to 1, found {self.norm_eps}")
        if self.ffn_dim_multiplier is not None and not 0.001 <= self.ffn_dim_multiplier <= 1000:
            raise ValueError(f"ffn_dim_multiplier should be from 0.001 to 1000, found {self.ffn_dim_multiplier}")
        if self.n_layers > MOST_LAYERS:
            raise ValueError(f"n_layers should be at most {MOST_LAYERS:,}, found {self.n_layers}")
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} does not divide into n_heads {self.n_heads}; change one or set head_dim")
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.head_dim > LARGEST_HEAD:
            raise ValueError(f"head_dim should be at most {LARGEST_HEAD}, found {self.head_dim}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; the rotary encoding turns pairs of dimensions")
        if self.hidden_dim is None:
            # Of SwiGLU's three matrices, 8/3 dim makes as many weights as 4 dim does of the two of an older MLP.
            width = int((self.ffn_dim_multiplier or 1) * (8 * self.dim // 3))
            object.__setattr__(self, "hidden_dim", self.multiple_of * -(-width // self.multiple_of))  # rounded up
        if not 1 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta should be a number above 1, found {self.rope_theta!r}")
        if self.rope_scaling is not None:
            import rope  # not at the top: it loads torch, and the argument parser should not

            # Make the encoding once, only to refuse a rope_scaling that contradicts itself before a model is built.
            # Where the data will give the length, the window is one that every entry covers, and `made` checks anew.
            length = self.max_seq_len or self.rope_scaling.get(rope.WINDOW) or 1
            rope.make(self.head_dim, self.rope_theta, self.rope_scaling, length)

    def n_parameters(self) -> int:
        """Return the number of parameters of a model of this shape, without building it (and without those of CLEX)."""
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = self.dim * (q_dim + 2 * kv_dim) + q_dim * self.dim  # q, k, v; o
        attention += (q_dim + 2 * kv_dim) * self.attention_bias + 2 * self.head_dim * self.qk_norm
        block = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim  # gate, up, down; two norms
        tables = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)  # embedding and head
        return tables + self.n_layers * block + self.dim  # the last norm

    def replace(self, **changes: Any) -> ModelArgs:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class NewModelArgs(ModelArgs):
    """Model size; names as in Meta's LLaMA code."""

    max_seq_len: int | None = None  # type: ignore[assignment]
    """longest text of the model in tokens. None: of a new model the length of its rows, --data.seq_len, because
    positions beyond are never trained; with --init_from that of the checkpoint"""

    def made(self, vocab_size: int, max_seq_len: int) -> ModelArgs:
        """Return the shape of a new model; `max_seq_len` counts where no flag has set it."""
        known = {"vocab_size": vocab_size, "max_seq_len": self.max_seq_len or max_seq_len}
        return ModelArgs(**vars(self) | known)


@dataclass(frozen=True)
class RopeArgs:
    """How to stretch the positions of a checkpoint that training continues from."""

    type: str | None = None
    """how positions are stretched (linear, ntk, dynamic, yarn, llama3, clex); None: as in the checkpoint, else yarn"""
    factor: float | None = None
    """new context divided by the context of the first training; None: as --model.max_seq_len asks"""

    def __post_init__(self) -> None:
        """Raise ValueError for a factor that would shorten the context."""
        if self.factor is not None and not 1 <= self.factor < math.inf:
            raise ValueError(f"--rope.factor should be a finite number, 1 or more, found {self.factor:g}")

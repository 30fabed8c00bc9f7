"""LLaMA2, written by hand (Touvron et al. 2023, arXiv:2307.09288): read it from top to bottom.

    tokens -> embedding -> n_layers x [ x += attention(norm(x)); x += feed_forward(norm(x)) ] -> norm -> head

Shapes: B batch, T tokens, V vocabulary, H query heads, K key/value heads, D head dimension, F feed-forward width.
Modules and parameters carry the names of Hugging Face's `LlamaForCausalLM`, so weights move between the two as they
are. The model knows nothing of how it is trained: parameters may be float32 while activations run in `compute_dtype`,
each weight being cast where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import rope
from attention.backends import Mask, ShiftedSparse, attend, prepare
from attention.cache import KVCache, View, cache_class
from checkpoint import config_json, safetensors_files
from hardware import start_compiler
from loss import linear_cross_entropy
from model_args import ModelArgs

Angles = tuple[torch.Tensor, torch.Tensor]  # cos and sin
Context = tuple[Angles, Angles | None, Mask]  # shared by all layers; the second: of keys that a cache keeps unturned


class Linear(nn.Linear):
    """A linear layer that runs in the dtype of its input, whatever dtype its parameters are kept in."""

    def reset_parameters(self) -> None:
        """Nothing: `Transformer.init_weights` fills all weights, once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019), the division in float32 or wider."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions and grouped key/value heads."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.q_proj = Linear(args.dim, q_dim, bias=args.attention_bias)
        self.k_proj = Linear(args.dim, kv_dim, bias=args.attention_bias)
        self.v_proj = Linear(args.dim, kv_dim, bias=args.attention_bias)
        self.o_proj = Linear(q_dim, args.dim, bias=False)
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None

    def forward(
        self, x: torch.Tensor, angles: Angles, key_angles: Angles | None, mask: Mask, cache: KVCache | None
    ) -> torch.Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rope.rotate(q, *angles)
        if key_angles is None:
            k = rope.rotate(k, *angles)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        if key_angles is not None:  # the cache keeps keys as they were before they turned
            k = rope.rotate(k, *key_angles)
        out = attend(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate_proj = Linear(args.dim, args.hidden_dim, bias=False)
        self.up_proj = Linear(args.dim, args.hidden_dim, bias=False)
        self.down_proj = Linear(args.hidden_dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(args.dim, args.norm_eps)
        self.self_attn = Attention(args, layer)
        self.post_attention_layernorm = RMSNorm(args.dim, args.norm_eps)
        self.mlp = FeedForward(args)

    def forward(self, x: torch.Tensor, *context: Any) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything but the head; a module of its own only because its name is part of every parameter's name."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(args.vocab_size, args.dim), freeze=False)
        self.layers = nn.ModuleList(Block(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)


class Transformer(nn.Module):
    """A LLaMA language model; without `initialize` its weights are left to be loaded."""

    def __init__(self, args: ModelArgs, initialize: bool = True) -> None:
        super().__init__()
        self.args = args
        self.compute_dtype: torch.dtype | None = None  # dtype of activations; None: that of the embedding
        self.gradient_checkpointing = False  # recompute each block in the backward pass instead of keeping it
        self.shifted_sparse: ShiftedSparse | None = None  # attend in groups while training on long rows
        self.model = Decoder(args)
        self.lm_head = Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rope = rope.make(args.head_dim, args.rope_theta, args.rope_scaling, args.max_seq_len)
        if initialize:
            self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02); the two matrices of a block that write to the residual stream (o_proj, down_proj) smaller by
        sqrt(2 n_layers), so that the stream's variance does not grow with depth (Radford et al. 2019, GPT-2)."""
        if isinstance(self.rope, nn.Module):
            self.rope.reset_parameters()
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith("rope."):
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.args.n_layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        token_losses: bool = False,
        cache: KVCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V) in float32; or, with `targets`, the sum of the token losses and the number of targets.

        tokens (B, T) int64. targets (B, T) int64, already shifted, -100 where ignored. positions (B, T) restart per
        document in packed rows; default 0..T-1, or what follows the cache. doc_ids (B, T) int32: attention never
        crosses a change of id. loss_weights (B, T) float32 multiply each token's loss. The caller divides the sum by
        the number of targets of the whole optimizer step, over micro-batches and ranks. token_losses: the loss of each
        target (B, T), without its weight and detached, in place of their number.
        """
        hidden = self.hidden(tokens, positions=positions, doc_ids=doc_ids, cache=cache)  # (B, T, dim)
        if targets is None:
            return self.logits(hidden)
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, loss_weights, token_losses=token_losses)

    def hidden(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, dim) after the last norm, in the activations' dtype: what the head turns into logits.

        lengths, with a cache: of each row's text with these tokens, where padding on the right makes it less than the
        last position tells. Encodings that depend on the length and caches that forget have to know.
        """
        if cache is None:
            context = self._of_rows(tokens, positions, doc_ids)
        elif len(sizes := cache.passes(tokens.shape[1])) > 1:  # more than the cache takes at once
            at = [None] * len(sizes) if positions is None else positions.split(sizes, dim=1)
            parts = zip(tokens.split(sizes, dim=1), at)
            return torch.cat([self.hidden(x, positions=p, cache=cache, lengths=lengths) for x, p in parts], dim=1)
        else:
            context = self._of_cache(cache.extend(positions, tokens.shape[1], lengths))
        x = self.model.embed_tokens(tokens).to(self.activation_dtype)
        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, cache, use_reentrant=False)
            else:
                x = block(x, *context, cache)
        return self.model.norm(x)

    def _of_rows(self, tokens: torch.Tensor, positions: torch.Tensor | None, doc_ids: torch.Tensor | None) -> Context:
        """What all layers share where the tokens of a row see each other, or their document."""
        T, device = tokens.shape[1], tokens.device
        length = T if positions is None or self.rope.cache_rotated else rope.text_lengths(positions, doc_ids)
        positions = torch.arange(T, device=device)[None] if positions is None else positions  # (B or 1, T)
        group = None if self.shifted_sparse is None else self.shifted_sparse.group_for(T, self.training)
        mask = Mask(doc_ids, self.args.sliding_window, group=group)
        prepare(mask, T, self.args.head_dim, self.activation_dtype, device)
        return self._angles(positions, length, 2, self.training), None, mask

    def _of_cache(self, view: View) -> Context:
        """What all layers share where tokens see what a cache holds."""
        keys = None if view.key_positions is None else self._angles(view.key_positions, view.lengths, 1)
        mask = Mask(dense=view.mask, window=self.args.sliding_window)
        return self._angles(view.positions, view.lengths, 2), keys, mask

    def _angles(self, positions: torch.Tensor, length: int | torch.Tensor, dim: int, training: bool = False) -> Angles:
        """cos and sin, (B or 1, T, D/2) and a dimension for the heads at `dim`, in texts of `length` tokens."""
        cos, sin = rope.cos_sin(*self.rope.prepare(positions, length, training))
        return cos.unsqueeze(dim), sin.unsqueeze(dim)

    @property
    def activation_dtype(self) -> torch.dtype:
        """Of hidden states, and of keys and values in a cache."""
        return self.compute_dtype or self.model.embed_tokens.weight.dtype

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V), float32 or wider, of hidden states (..., dim)."""
        out = self.lm_head(hidden)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def make_cache(self, batch: int, max_len: int | None = None, kind: str = "static", **options: int) -> KVCache:
        """An empty cache for `batch` rows of up to `max_len` tokens (default: the model's own limit); what `kind`
        (static, int8, sinks) and the options `text_len` and `sinks` are, attention/cache.py says."""
        a, device = self.args, self.model.embed_tokens.weight.device
        shape = (a.n_layers, batch, a.n_kv_heads, a.head_dim, max_len or a.max_seq_len)
        made = {"dtype": self.activation_dtype, "device": device, "window": a.sliding_window}
        return cache_class(kind)(*shape, **made, rotated=self.rope.cache_rotated, **options)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let torch.compile make the forward pass, in place: parameters keep their names."""
        start_compiler()
        super().compile(*args, **kwargs)

    def n_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def from_pretrained(
        cls, directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Transformer:
        """The model of a Hugging Face directory, its parameters in `dtype`: as they lie in the mapped file where dtype
        and device are the file's, one by one otherwise. Raises ValueError naming what does not fit."""
        return safetensors_files.load(
            lambda config: cls(config_json.read(config), initialize=False), directory, device, dtype
        )

    def save_pretrained(self, directory: Path, config: dict[str, Any] | None = None) -> None:
        """Write the model as a Hugging Face directory, its parameters in their dtype; `config`: more for config.json,
        such as the ids of special tokens. Large models are written in shards."""
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        config = config_json.write(self.args) | {"dtype": dtype} | (config or {})
        safetensors_files.write_model(directory, config, safetensors_files.state_of(self))

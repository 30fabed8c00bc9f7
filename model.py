"""LLaMA2, written by hand (Touvron et al. 2023, arXiv:2307.09288): read it from top to bottom.

    tokens -> embedding -> n_layers x [ x += attention(norm(x)); x += feed_forward(norm(x)) ] -> norm -> head

Shapes: B batch, T tokens, V vocabulary, H query heads, K key/value heads, D head dimension, F feed-forward width,
S keys that a query may see (T in training; as many as the cache holds in decoding).

Modules and parameters have the names of Hugging Face's `LlamaForCausalLM`, so that weights move between the two without
renaming. The model does not know how it is trained or stored: parameters may be float32 while activations are computed
in `compute_dtype`, and each weight is cast where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import rope
from attention.backends import Mask, ShiftedSparse, attend, prepare
from attention.cache import KVCache, View, cache_class
from hardware import start_compiler
from loss import linear_cross_entropy
from model_args import ModelArgs

Angles = tuple[torch.Tensor, torch.Tensor]  # cos and sin of the rotary angles, with a dimension of 1 for the heads
# What all layers of a pass share: the angles of its T tokens, the angles of the S keys in the cache, and the mask. The
# second is None unless the cache stores keys before their rotation; then all S keys are rotated at every use.
Context = tuple[Angles, Angles | None, Mask]


class Linear(nn.Linear):
    """A linear layer, y = x W^T + b, that computes in the dtype of its input, whatever the dtype of its parameters."""

    def reset_parameters(self) -> None:
        """Do nothing: `Transformer.init_weights` fills all weights, once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out) for x (..., in)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape and dtype of x (..., dim)."""
        # The mean of squares needs float32: in bfloat16 it would keep 8 bits, in float16 it could overflow.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)  # mean over dim: (..., 1)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions, and with key/value heads that groups of H / K query heads share."""

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
        """Return (B, T, dim) for x (B, T, dim). The angles and the mask are those of `Context`."""
        B, T, _ = x.shape
        # Project, and split the last dimension into heads; -1 is H or K.
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # each head on its own, over D
        # Rotate queries and keys by their positions: q . k then depends on the distance between the two.
        q = rope.rotate(q, *angles)
        if key_angles is None:
            k = rope.rotate(k, *angles)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, K, T, D) twice
        if cache is not None:  # store the T new keys and values, and attend to all S that are stored
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D) each
        if key_angles is not None:
            k = rope.rotate(k, *key_angles)
        # softmax(q k^T / sqrt(D) + mask) v, by the back-end that attention/backends.py chooses.
        out = attend(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # heads side by side: (B, T, H D) -> (B, T, dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate_proj = Linear(args.dim, args.hidden_dim, bias=False)
        self.up_proj = Linear(args.dim, args.hidden_dim, bias=False)
        self.down_proj = Linear(args.hidden_dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, T, dim) for x (B, T, dim)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, F) inside


class Block(nn.Module):
    """One transformer block; each half normalizes its input, and adds its output to the residual stream (pre-norm)."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(args.dim, args.norm_eps)
        self.self_attn = Attention(args, layer)
        self.post_attention_layernorm = RMSNorm(args.dim, args.norm_eps)
        self.mlp = FeedForward(args)

    def forward(self, x: torch.Tensor, *context: Any) -> torch.Tensor:
        """Return (B, T, dim) for x (B, T, dim); context: the other arguments of `Attention.forward`."""
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
    """A LLaMA language model. `initialize=False` leaves the weights empty, for a caller that loads them."""

    def __init__(self, args: ModelArgs, initialize: bool = True) -> None:
        super().__init__()
        self.args = args
        self.compute_dtype: torch.dtype | None = None  # dtype of activations; None: that of the parameters
        self.gradient_checkpointing = False  # recompute each block in the backward pass instead of keeping it
        self.z_loss = 0.0  # weight of log(Z)² in the gradient of the loss; see loss.py
        self.shifted_sparse: ShiftedSparse | None = None  # attend in groups while training on long rows
        self.model = Decoder(args)
        self.lm_head = Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:  # one matrix (V, dim) reads ids and scores them
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rope = rope.make(args.head_dim, args.rope_theta, args.rope_scaling, args.max_seq_len)
        if initialize:
            self.init_weights()

    def init_weights(self) -> None:
        """Fill matrices with N(0, 0.02^2) and biases with 0; norms stay at 1 (Radford et al. 2019, GPT-2)."""
        if isinstance(self.rope, nn.Module):  # CLEX has weights of its own
            self.rope.reset_parameters()
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith("rope."):
                # A block adds two matrices' output to the residual stream: 2 n_layers terms in all. Each is smaller by
                # sqrt(2 n_layers), so that the stream's variance does not grow with depth.
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
        """Return logits (B, T, V) in float32; with `targets`, the sum of the token losses and the number of targets.

        tokens (B, T) int64. targets (B, T) int64, already shifted, -100 where ignored. positions (B, T) int64 restart
        per document in packed rows; default: 0..T-1, or what follows the cache. doc_ids (B, T) int32: attention never
        crosses a change of id. loss_weights (B, T) float32 multiply each token's loss. token_losses: return the loss of
        each target (B, T), unweighted and detached, instead of their number.

        The caller divides the sum by the number of targets of the whole optimizer step, over micro-batches and ranks.
        """
        hidden = self.hidden(tokens, positions=positions, doc_ids=doc_ids, cache=cache)  # (B, T, dim)
        if targets is None:
            return self.logits(hidden)
        # Head and cross-entropy in one, block by block: the logits of all tokens never exist at once.
        how = {"token_losses": token_losses, "z_loss": self.z_loss}
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, loss_weights, **how)

    def hidden(
        self,
        tokens: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (B, T, dim) after the last norm, in `activation_dtype`; `logits` applies the head.

        lengths: number of real tokens in each row after this pass. Needed with a cache when rows are padded on the
        right, because the last position then overstates it.
        """
        if cache is None:
            context = self.context_for_rows(tokens, positions, doc_ids)
        elif len(sizes := cache.passes(tokens.shape[1])) > 1:  # more tokens than the cache takes at once
            at = [None] * len(sizes) if positions is None else positions.split(sizes, dim=1)  # (B, size) each
            parts = zip(tokens.split(sizes, dim=1), at)
            return torch.cat([self.hidden(x, positions=p, cache=cache, lengths=lengths) for x, p in parts], dim=1)
        else:
            context = self.context_for_cache(cache.extend(positions, tokens.shape[1], lengths))
        x = self.model.embed_tokens(tokens).to(self.activation_dtype)  # (B, T, dim): the residual stream
        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, cache, use_reentrant=False)
            else:
                x = block(x, *context, cache)
        return self.model.norm(x)

    def context_for_rows(
        self, tokens: torch.Tensor, positions: torch.Tensor | None = None, doc_ids: torch.Tensor | None = None
    ) -> Context:
        """Compute the rotary angles and the mask for a pass without a cache (training, evaluation); all layers share
        them."""
        T, device = tokens.shape[1], tokens.device
        # Some encodings (dynamic NTK) have other frequencies in longer texts, and a packed row holds several texts.
        length = T if positions is None or self.rope.cache_rotated else rope.text_lengths(positions, doc_ids)
        positions = torch.arange(T, device=device)[None] if positions is None else positions  # (B or 1, T)
        group = None if self.shifted_sparse is None else self.shifted_sparse.group_for(T, self.training)
        mask = Mask(doc_ids, self.args.sliding_window, group=group)
        # Before the layers run: a checkpointed, compiled block may not make what the other blocks use.
        prepare(mask, T, self.args.head_dim, self.activation_dtype, device)
        return self._angles(positions, length, 2, self.training), None, mask

    def context_for_cache(self, view: View) -> Context:
        """The same for a pass that reads a key-value cache."""
        # Keys have their heads in dimension 1, (B, K, S, D), when they come out of the cache; new queries in 2.
        keys = None if view.key_positions is None else self._angles(view.key_positions, view.lengths, 1)
        mask = Mask(dense=view.mask, window=self.args.sliding_window)
        return self._angles(view.positions, view.lengths, 2), keys, mask

    def _angles(self, positions: torch.Tensor, length: int | torch.Tensor, dim: int, training: bool = False) -> Angles:
        """Return cos and sin for positions (B or 1, T) in texts of `length` tokens: (B or 1, T, D/2), with a dimension
        of 1 for the heads inserted at `dim`."""
        cos, sin = rope.cos_sin(*self.rope.prepare(positions, length, training))  # (B or 1, T, D/2) each
        return cos.unsqueeze(dim), sin.unsqueeze(dim)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (..., V), float32 or wider, for hidden states (..., dim)."""
        out = self.lm_head(hidden)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    # ---- what the training loop, decoding and adapters use besides

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding, (V, dim)."""
        return self.model.embed_tokens

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.embedding.weight.dtype

    @property
    def activation_dtype(self) -> torch.dtype:
        """Dtype of hidden states, and of keys and values in a cache."""
        return self.compute_dtype or self.dtype

    @property
    def module_tree(self) -> nn.Module:
        """The module whose names an adapter's file uses: this one."""
        return self

    def make_cache(self, batch: int, max_len: int | None = None, kind: str = "static", **options: int) -> KVCache:
        """Make an empty cache for `batch` rows of up to `max_len` tokens (default: the model's max_seq_len).

        kind (static, int8, sinks) and the options `text_len` and `sinks` are explained in attention/cache.py.
        """
        a = self.args
        shape = (a.n_layers, batch, a.n_kv_heads, a.head_dim, max_len or a.max_seq_len)
        tensors = {"dtype": self.activation_dtype, "device": self.device, "window": a.sliding_window}
        return cache_class(kind)(*shape, **tensors, rotated=self.rope.cache_rotated, **options)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward pass with torch.compile, in place: parameters keep their names."""
        start_compiler()
        super().compile(*args, **kwargs)

    def n_parameters(self) -> int:
        """Return the number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.parameters())

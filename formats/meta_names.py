"""Meta's names of the tensors of a LLaMA, and its order of the rows of q and k; llama2.c and GGUF share the order.

Rotary positions turn pairs of dimensions. Meta's pairs are neighbours (0, 1), (2, 3), ...; those of Hugging Face, and
of `model.py`, lie half a head apart (0, D/2), (1, D/2 + 1), ... The two models are the same with the rows of q and k in
another order.
"""

from __future__ import annotations

import re

import torch

NAMES = {  # ours -> Meta's; N stands for the number of the layer
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.N.input_layernorm.weight": "layers.N.attention_norm.weight",
    "model.layers.N.self_attn.q_proj.weight": "layers.N.attention.wq.weight",
    "model.layers.N.self_attn.k_proj.weight": "layers.N.attention.wk.weight",
    "model.layers.N.self_attn.v_proj.weight": "layers.N.attention.wv.weight",
    "model.layers.N.self_attn.o_proj.weight": "layers.N.attention.wo.weight",
    "model.layers.N.post_attention_layernorm.weight": "layers.N.ffn_norm.weight",
    "model.layers.N.mlp.gate_proj.weight": "layers.N.feed_forward.w1.weight",
    "model.layers.N.mlp.down_proj.weight": "layers.N.feed_forward.w2.weight",
    "model.layers.N.mlp.up_proj.weight": "layers.N.feed_forward.w3.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
BACK = {theirs: ours for ours, theirs in NAMES.items()}


def translate(name: str, names: dict[str, str]) -> str | None:
    """Return a tensor's name by a table in which N stands for the number of the layer; None where it is not there."""
    number = re.search(r"(?<=[.])\d+(?=[.])", name)
    pattern = name if number is None else f"{name[: number.start()]}N{name[number.end() :]}"
    found = names.get(pattern)
    return found and (found if number is None else found.replace("N", number[0], 1))


def heads_of(name: str, n_heads: int, n_kv_heads: int) -> int | None:
    """Return the number of heads in the rows of q or k; None for another tensor. name: ours."""
    if ".q_proj." in name:
        return n_heads
    return n_kv_heads if ".k_proj." in name else None


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q's or k's weight (H D, in) or bias (H D,) of Hugging Face with its rows in Meta's order."""
    # (H, 2, D/2, in): row i of a head's first half stands before row i of its second half
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q's or k's weight (H D, in) or bias (H D,) of Meta with its rows in the order of Hugging Face."""
    # (H, D/2, 2, in): the first of each pair of neighbours goes to the first half of its head
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)

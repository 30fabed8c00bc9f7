"""How Megatron-LM names the tensors of a model, and which piece of each a rank holds."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from formats.base import Entry
from model_args import ModelArgs

MULTIPLE = 128  # of rows of a table on each rank
ATTENTION, MLP = "self_attention.", "mlp."
TENSORS = {  # name in a layer of Megatron, parts of it in ours, how the ranks of TP hold it
    f"{ATTENTION}linear_qkv.layer_norm_weight": (("input_layernorm.weight",), "whole"),
    f"{ATTENTION}linear_qkv.weight": (tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), "qkv"),
    f"{ATTENTION}linear_qkv.bias": (tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), "qkv"),
    f"{ATTENTION}q_layernorm.weight": (("self_attn.q_norm.weight",), "whole"),
    f"{ATTENTION}k_layernorm.weight": (("self_attn.k_norm.weight",), "whole"),
    f"{ATTENTION}linear_proj.weight": (("self_attn.o_proj.weight",), "columns"),
    f"{MLP}linear_fc1.layer_norm_weight": (("post_attention_layernorm.weight",), "whole"),
    f"{MLP}linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "halves"),
    f"{MLP}linear_fc2.weight": (("mlp.down_proj.weight",), "columns"),
}
TABLES = {
    "embedding.word_embeddings.weight": (("model.embed_tokens.weight",), "rows"),
    "decoder.final_layernorm.weight": (("model.norm.weight",), "whole"),
    "output_layer.weight": (("lm_head.weight",), "rows"),
}
OTHER_NAMES = (  # of other versions -> those above
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"(?<=\d\.)(input_norm|input_layernorm)\.weight$", f"{ATTENTION}linear_qkv.layer_norm_weight"),
    (
        r"(?<=\d\.)(post_attention_norm|post_attention_layernorm|pre_mlp_layernorm)\.weight$",
        f"{MLP}linear_fc1.layer_norm_weight",
    ),
    (r"query_key_value\.", "linear_qkv."),
    (r"self_attention\.dense\.", f"{ATTENTION}linear_proj."),
    (r"dense_h_to_4h\.", "linear_fc1."),
    (r"dense_4h_to_h\.", "linear_fc2."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
)


def ours_of(name: str) -> str:
    """Return Megatron core's name, with Transformer Engine, of a tensor."""
    for pattern, new in OTHER_NAMES:
        name = re.sub(pattern, new, name)
    return name


def target_of(name: str) -> tuple[tuple[str, ...], str] | None:
    """Return our names of the parts of a tensor, and how it is cut; None for a tensor that is not known."""
    if name in TABLES:
        return TABLES[name]
    if (match := re.match(r"decoder\.layers\.(\d+)\.(.+)$", name)) and match[2] in TENSORS:
        parts, cut = TENSORS[match[2]]
        return tuple(f"model.layers.{match[1]}.{part}" for part in parts), cut
    return None


def moved(name: str, first: int) -> str:
    """Return the name of a tensor of a stage whose layers begin with layer `first` of the model."""
    return re.sub(r"(?<=^decoder\.layers\.)\d+", lambda each: str(int(each[0]) + first), name)


# ---- pieces to parts


def joined_shapes(shapes: list[tuple[int, ...]], cut: str, args: ModelArgs) -> list[tuple[int, ...]]:
    """Return the shapes of the parts of a tensor whose pieces have these."""
    rows, rest = sum(shape[0] for shape in shapes), shapes[0][1:]
    if cut == "whole":
        return [shapes[0]]
    if cut == "columns":
        return [(shapes[0][0], sum(shape[1] for shape in shapes))]
    if cut == "rows":
        return [(min(rows, args.vocab_size), *rest)]
    if cut == "halves":
        return [(rows // 2, *rest)] * 2
    share = args.n_heads // args.n_kv_heads  # query heads to a key/value head
    kv = rows // (share + 2)  # rows of all keys: a group has `share` heads of queries, one of keys, one of values
    return [(kv * share, *rest), (kv, *rest), (kv, *rest)]


def join(pieces: list[torch.Tensor], cut: str, number: int, args: ModelArgs) -> torch.Tensor:
    """Return part `number` of a tensor that the ranks hold in pieces."""
    if cut == "whole":
        return pieces[0]
    if cut == "columns":
        return torch.cat(pieces, 1)  # (out, in / tp) each -> (out, in)
    if cut == "rows":
        return torch.cat(pieces)[: args.vocab_size]  # (padded V / tp, dim) each -> (V, dim)
    if cut == "halves":  # every rank has its part of the gate, then its part of up
        return torch.cat([piece.chunk(2)[number] for piece in pieces])
    # qkv: a rank has whole groups, and in each group its query heads, then its key, then its value
    rows, share = torch.cat(pieces), args.n_heads // args.n_kv_heads
    groups = rows.unflatten(0, (args.n_kv_heads, share + 2, args.head_dim))  # (K, H/K + 2, D, ...), K: n_kv_heads
    part = (slice(0, share), slice(share, share + 1), slice(share + 1, None))[number]
    return groups[:, part].flatten(0, 2)  # (K, heads of the part, D, ...) -> (rows of the part, ...)


# ---- parts to pieces


def names_of_stage(args: ModelArgs, stage: int, n_stages: int) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield (name in Megatron, our names, how it is cut) of the tensors of a stage."""
    per_stage = args.n_layers // n_stages
    embedding, norm, head = TABLES.items()
    if stage == 0:
        yield embedding[0], *embedding[1]
    for layer in range(per_stage):
        for name, (parts, cut) in TENSORS.items():
            prefix = f"model.layers.{stage * per_stage + layer}."
            yield f"decoder.layers.{layer}.{name}", tuple(prefix + part for part in parts), cut
    if stage == n_stages - 1:
        yield norm[0], *norm[1]
        if not args.tie_embeddings:
            yield head[0], *head[1]
        elif n_stages > 1:  # a copy of the embedding
            yield head[0], *embedding[1]


def padded(rows: int, tp: int) -> int:
    """Return the rows of a table with padding."""
    return -(-rows // (MULTIPLE * tp)) * MULTIPLE * tp


def cut_shape(parts: list[Entry], cut: str, tp: int) -> tuple[int, ...]:
    """Return the shape of a rank's piece of a tensor."""
    rows, *rest = parts[0].shape
    if cut == "whole":
        return parts[0].shape
    if cut == "columns":
        return (rows, rest[0] // tp)
    rows = padded(rows, tp) if cut == "rows" else sum(part.shape[0] for part in parts)
    return (rows // tp, *rest)


def cut_piece(parts: list[Entry], cut: str, rank: int, tp: int, args: ModelArgs) -> torch.Tensor:
    """Return a rank's piece of a tensor that is made of our `parts`."""
    tensors = [part.load() for part in parts]
    if cut == "whole":
        return tensors[0]
    if cut == "columns":
        return tensors[0].chunk(tp, 1)[rank]  # (out, in / tp)
    if cut == "halves":
        return torch.cat([tensor.chunk(tp)[rank] for tensor in tensors])  # (2 hidden / tp, in)
    if cut == "rows":
        table = tensors[0]
        more = table.new_zeros(padded(len(table), tp) - len(table), table.shape[1])
        return torch.cat([table, more]).chunk(tp)[rank]  # (padded V / tp, dim)
    # qkv: cut by groups, not by rows, so that query heads stay with their key and value
    heads = [tensor.unflatten(0, (args.n_kv_heads, -1, args.head_dim)) for tensor in tensors]  # (K, H/K or 1, D, ...)
    return torch.cat(heads, 1).chunk(tp)[rank].flatten(0, 2)  # (K / tp, H/K + 2, D, ...) -> (rows / tp, ...)

"""LLaMA's formulas in float64, written the dumbest way: one text at a time, loops over heads and queries.

Angles are float64, too; a test that asks for more than float32 agreement gives the model the same with
`exact_cos_sin`.
"""

import math
from collections.abc import Callable, Sequence

import torch


def exact_cos_sin(
    positions: torch.Tensor, inv_freq: list[float] | torch.Tensor, factor: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope.cos_sin` in float64, which the model's float32 angles would keep from any comparison beyond 1e-7."""
    angles = positions.double()[..., None] * torch.as_tensor(inv_freq, dtype=torch.float64)
    return angles.cos() * factor, angles.sin() * factor


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """One vector."""
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * weight


def turned(x: torch.Tensor, position: float, inv_freq: list[float], factor: float) -> torch.Tensor:
    """One head's vector (D,), each pair (x_i, x_{i+D/2}) turned as a complex number and multiplied by the factor."""
    half = len(x) // 2
    out = [None] * len(x)
    for i in range(half):
        cos, sin = math.cos(position * inv_freq[i]) * factor, math.sin(position * inv_freq[i]) * factor
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i] * sin + x[i + half] * cos
    return torch.stack(out)


def attention(query: torch.Tensor, keys: list, values: list) -> torch.Tensor:
    """One query's output over the keys it may see, one vector each, of one head."""
    scores = [(query * key).sum() / math.sqrt(len(query)) for key in keys]
    highest = max(s.item() for s in scores)
    powers = [torch.exp(s - highest) for s in scores]
    return sum(power / sum(powers) * value for power, value in zip(powers, values))


def heads(args, w: dict[str, torch.Tensor], prefix: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """q, k and v of one position before they turn, (heads, D) each."""
    found = {}
    for kind in ("q", "k", "v"):
        y = w[f"{prefix}.self_attn.{kind}_proj.weight"] @ x
        if args.attention_bias:
            y = y + w[f"{prefix}.self_attn.{kind}_proj.bias"]
        y = y.view(-1, args.head_dim)
        if args.qk_norm and kind != "v":
            weight = w[f"{prefix}.self_attn.{kind}_norm.weight"]
            y = torch.stack([rms_norm(head, weight, args.norm_eps) for head in y])
        found[kind] = y
    return found


def block(args, w: dict[str, torch.Tensor], prefix: str, xs: dict, past: dict, place: dict, turn: Callable) -> dict:
    """One transformer block on the tokens of one pass: index in the text -> vector (dim,).

    past: index -> heads of every token so far, to which these are added; place: index -> position, of the tokens that
    can be seen; turn(vector, position).
    """
    for i, x in xs.items():
        past[i] = heads(args, w, prefix, rms_norm(x, w[f"{prefix}.input_layernorm.weight"], args.norm_eps))
    window, group, ys = args.sliding_window or 10**9, args.n_heads // args.n_kv_heads, {}
    for i, x in xs.items():
        seen = [j for j in place if j <= i and place[i] - place[j] < window]
        outs = []
        for h in range(args.n_heads):
            keys = [turn(past[j]["k"][h // group], place[j]) for j in seen]
            outs.append(attention(turn(past[i]["q"][h], place[i]), keys, [past[j]["v"][h // group] for j in seen]))
        x = x + w[f"{prefix}.self_attn.o_proj.weight"] @ torch.cat(outs)
        n = rms_norm(x, w[f"{prefix}.post_attention_layernorm.weight"], args.norm_eps)
        gate, up = w[f"{prefix}.mlp.gate_proj.weight"] @ n, w[f"{prefix}.mlp.up_proj.weight"] @ n
        ys[i] = x + w[f"{prefix}.mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
    return ys


def plain_frequencies(args) -> tuple[list[float], float]:
    """RoFormer's."""
    return [args.rope_theta ** (-2 * i / args.head_dim) for i in range(args.head_dim // 2)], 1.0


def logits(
    args,
    weights: dict[str, torch.Tensor],
    tokens: list[int],
    passes: Sequence[int] | None = None,
    frequencies: Callable[[int], tuple[list[float], float]] | None = None,
    keep: Callable[[int], Sequence[int]] = range,
) -> torch.Tensor:
    """Logits (T, V), float64 and differentiable, of one text; `weights` are float64, by Hugging Face's names.

    passes: how many tokens are read at a time (default: all at once). keep(n): which tokens can still be seen when n
    have been read; each stands at its place among them. frequencies(m): of the encoding when m can be seen.
    """
    past: list[dict] = [{} for _ in range(args.n_layers)]
    done, outs = 0, []
    for size in passes or [len(tokens)]:
        kept = list(keep(done + size))
        place = {index: i for i, index in enumerate(kept)}
        inv_freq, factor = frequencies(len(kept)) if frequencies else plain_frequencies(args)
        xs = {i: weights["model.embed_tokens.weight"][tokens[i]] for i in range(done, done + size)}
        for layer in range(args.n_layers):
            xs = block(
                args, weights, f"model.layers.{layer}", xs, past[layer], place,
                lambda x, position, f=inv_freq, m=factor: turned(x, position, f, m),
            )  # fmt: skip
        outs += xs.values()
        done += size
    head = weights["model.embed_tokens.weight"] if args.tie_embeddings else weights["lm_head.weight"]
    return torch.stack([head @ rms_norm(x, weights["model.norm.weight"], args.norm_eps) for x in outs])

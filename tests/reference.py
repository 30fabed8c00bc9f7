"""LLaMA's formulas in float64, written the dumbest way: one document at a time, loops over heads and queries.

Angles are float64, too; a test that asks for more than float32 agreement gives the model the same with `exact_angles`.
"""

import math

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


def turned(x: torch.Tensor, position: float, theta: float) -> torch.Tensor:
    """One head's vector (D,), each pair (x_i, x_{i+D/2}) turned as a complex number."""
    half = len(x) // 2
    out = [None] * len(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return torch.stack(out)


def attention(q: list, k: list, v: list, visible: list[list[bool]]) -> list[torch.Tensor]:
    """q, k, v: one vector a position, of one head; `visible[i][j]`: may query i look at key j."""
    out = []
    for i, query in enumerate(q):
        scores = {j: (query * k[j]).sum() / math.sqrt(len(query)) for j in range(len(k)) if visible[i][j]}
        highest = max(s.item() for s in scores.values())
        powers = {j: torch.exp(s - highest) for j, s in scores.items()}
        total = sum(powers.values())
        out.append(sum(power / total * v[j] for j, power in powers.items()))
    return out


def block(args, w: dict[str, torch.Tensor], prefix: str, xs: list, positions: list[int]) -> list[torch.Tensor]:
    """One transformer block on one document: a list of vectors (dim,)."""
    D, T = args.head_dim, len(xs)
    heads: dict[str, list] = {"q": [], "k": [], "v": []}  # kind -> position -> (heads, D)
    for x, position in zip(xs, positions):
        x = rms_norm(x, w[f"{prefix}.input_layernorm.weight"], args.norm_eps)
        for kind in heads:
            y = w[f"{prefix}.self_attn.{kind}_proj.weight"] @ x
            if args.attention_bias:
                y = y + w[f"{prefix}.self_attn.{kind}_proj.bias"]
            y = y.view(-1, D)
            if args.qk_norm and kind != "v":
                weight = w[f"{prefix}.self_attn.{kind}_norm.weight"]
                y = torch.stack([rms_norm(head, weight, args.norm_eps) for head in y])
            if kind != "v":
                y = torch.stack([turned(head, position, args.rope_theta) for head in y])
            heads[kind].append(y)
    window = args.sliding_window or T
    visible = [[0 <= i - j < window for j in range(T)] for i in range(T)]
    outs = []
    for h in range(args.n_heads):
        kv = h // (args.n_heads // args.n_kv_heads)
        q, k, v = ([y[i] for y in heads[kind]] for kind, i in (("q", h), ("k", kv), ("v", kv)))
        outs.append(attention(q, k, v, visible))
    ys = []
    for t, x in enumerate(xs):
        x = x + w[f"{prefix}.self_attn.o_proj.weight"] @ torch.cat([out[t] for out in outs])
        n = rms_norm(x, w[f"{prefix}.post_attention_layernorm.weight"], args.norm_eps)
        gate, up = w[f"{prefix}.mlp.gate_proj.weight"] @ n, w[f"{prefix}.mlp.up_proj.weight"] @ n
        ys.append(x + w[f"{prefix}.mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up))
    return ys


def logits(args, weights: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Logits (T, V), float64 and differentiable, of one document; `weights` are float64, by Hugging Face's names."""
    xs = [weights["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(args.n_layers):
        xs = block(args, weights, f"model.layers.{layer}", xs, list(range(len(tokens))))
    head = weights["model.embed_tokens.weight"] if args.tie_embeddings else weights["lm_head.weight"]
    return torch.stack([head @ rms_norm(x, weights["model.norm.weight"], args.norm_eps) for x in xs])

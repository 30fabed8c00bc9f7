"""Hugging Face's `config.json` and our `ModelArgs`: the same shape under two vocabularies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rope

if TYPE_CHECKING:
    from model import ModelArgs

FAMILY = {  # model_type in config.json -> the class that transformers gives it
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def read(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelArgs` that a `config.json` asks for; ValueError names what our module cannot represent."""
    kind = config.get("model_type", "llama")
    if kind not in FAMILY:
        raise ValueError(f"config.json is of model_type {kind!r}; this module runs {', '.join(FAMILY)}")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json asks for hidden_act {config['hidden_act']!r}; LLaMA's feed-forward is 'silu'")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key):
            raise ValueError(f"config.json sets {key}, which this module does not have")
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "vocab_size": config["vocab_size"],
        "hidden_dim": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "max_seq_len": config.get("max_position_embeddings", 2048),
        "rope_theta": theta,
        "rope_scaling": None if rope.rope_type(scaling) == "default" else scaling,
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "attention_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "sliding_window": config.get("sliding_window") if kind == "mistral" else None,
    }


def write(args: ModelArgs) -> dict[str, Any]:
    """The `config.json` of a shape, with the present keys for positions and the older ones beside them."""
    kind = {
        (False, False, False): "llama",
        (False, False, True): "mistral",
        (True, False, False): "qwen2",
        (False, True, False): "qwen3",
    }.get((args.attention_bias, args.qk_norm, args.sliding_window is not None))
    if kind is None:
        raise ValueError("no Hugging Face model combines this attention_bias, qk_norm and sliding_window")
    scaling = args.rope_scaling or {"rope_type": "default"}
    config = {
        "architectures": [FAMILY[kind]],
        "model_type": kind,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "intermediate_size": args.hidden_dim,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.max_seq_len,
        "rope_theta": args.rope_theta,
        "rope_scaling": args.rope_scaling,
        "rope_parameters": {**scaling, "rope_theta": args.rope_theta},
        "tie_word_embeddings": args.tie_embeddings,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
    }
    return config | ({"sliding_window": args.sliding_window} if kind == "mistral" else {})

"""Translate between Hugging Face's `config.json` and our `ModelArgs`: one shape in two vocabularies.

A key that a config leaves out has the default that transformers has for its model_type. A key that asks for a
computation that `model.py` does not do is refused by name; other keys (`use_cache`, `pretraining_tp`) are ignored.
"""

from __future__ import annotations

from typing import Any

from model_args import ModelArgs

FAMILY = {  # model_type in config.json -> the class that transformers gives it
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
OMITTED = {  # model_type -> transformers' defaults for keys that a config.json may leave out
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
# Keys of computations that ours does not do -> values that leave them out; null and an absent key do so, too.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "mlp_bias": (False,),
    "use_qk_norm": (False,),
    "alibi": (False,),
    "attention_dropout": (0.0,),
    "hidden_dropout": (0.0,),
    "resid_pdrop": (0.0,),
    "embd_pdrop": (0.0,),
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "logit_softcapping": (),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "no_rope_layers": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
}
ORIGINAL = "original_max_position_embeddings"


def read(config: dict[str, Any]) -> ModelArgs:
    """Return the shape that a `config.json` describes; raises ValueError that names what ours cannot represent."""
    kind = config.get("model_type", "llama")
    if kind not in FAMILY:
        raise ValueError(f"config.json is of model_type {kind!r}; this module runs {', '.join(FAMILY)}")
    refuse_the_foreign(config, kind)
    config = OMITTED[kind] | config
    theta, scaling = read_rope(config)
    n_heads = integer(config, "num_attention_heads")
    return ModelArgs(
        dim=integer(config, "hidden_size"),
        n_layers=integer(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=integer(config, "num_key_value_heads", n_heads),
        head_dim=integer(config, "head_dim", integer(config, "hidden_size") // max(n_heads, 1)),
        vocab_size=integer(config, "vocab_size"),
        hidden_dim=integer(config, "intermediate_size"),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        max_seq_len=longest_text(config, scaling),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=flag(config, "tie_word_embeddings"),
        attention_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        sliding_window=read_window(config, kind),
    )


def refuse_the_foreign(config: dict[str, Any], kind: str) -> None:
    """Raise ValueError for a key whose value asks for a computation that `model.py` does not do."""
    quantization = config.get("quantization_config")
    is_mapping = isinstance(quantization, dict)
    # online: full weights, which are rounded as they are used (quantized.trained_bits)
    if quantization and not (is_mapping and quantization.get("quantization_mode") == "online"):
        method = quantization.get("quant_method", "some method") if is_mapping else quantization
        raise ValueError(f"config.json says that the weights are quantized ({method}); dequantize them first")
    for key, neutral in NEUTRAL.items():
        if config.get(key) is not None and config[key] not in neutral:
            raise ValueError(f"config.json sets {key} to {config[key]!r}, which this module does not do")
    if config.get("attention_bias") and kind != "qwen2":  # Qwen2 has its biases whatever this key says
        raise ValueError("config.json sets attention_bias, on q, k, v and o: this module has it on q, k, v (qwen2)")


def read_window(config: dict[str, Any], kind: str) -> int | None:
    """Return the sliding window of all layers, None where no layer has one; ValueError where only some layers do."""
    if kind == "llama":
        return None  # transformers' LLaMA has none, whatever the file says
    window = integer(config, "sliding_window", None)
    if kind == "mistral":
        return window
    n_layers, first = integer(config, "num_hidden_layers"), integer(config, "max_window_layers", 28)
    slides = flag(config, "use_sliding_window") and window is not None
    types = config.get("layer_types") or []
    if not isinstance(types, list) or not all(isinstance(each, str) for each in types):
        raise ValueError(f"config.json: layer_types should be a list of names, one a layer, found {types!r:.100}")
    kinds = set(types)
    if not kinds:  # Qwen: the first `max_window_layers` layers attend in full, the others in the window
        kinds |= {"sliding_attention"} if slides and first < n_layers else set()
        kinds |= {"full_attention"} if not slides or first > 0 else set()
    if kinds == {"full_attention"}:
        return None
    if kinds == {"sliding_attention"} and slides:
        return window
    raise ValueError(
        "config.json asks by layer_types, or use_sliding_window and max_window_layers, for attention that differs "
        f"from layer to layer ({', '.join(sorted(kinds))}): this module has one sliding window for all, or none"
    )


def read_rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return base and scaling (None: plain) of the rotary encoding.

    They stand under `rope_parameters`, or in older files under `rope_theta` and `rope_scaling`. Raises ValueError where
    both are there and contradict each other.
    """
    entries = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    for key, value in entries.items():
        if not isinstance(value, dict):
            raise ValueError(f"config.json: {key} should be a mapping, found {value!r}")
        if any(isinstance(inner, dict) for inner in value.values()):
            raise ValueError(f"config.json: {key} differs from layer type to layer type: this module has one for all")
    scalings = {key: scaling_of(key, value) for key, value in entries.items()}
    if len(scalings) == 2 and scalings["rope_parameters"] != scalings["rope_scaling"]:
        raise ValueError(f"config.json contradicts itself: {' and '.join(f'{k} {v}' for k, v in entries.items())}")
    thetas = {number(each, "rope_theta", None) for each in (config, *entries.values())} - {None}
    if len(thetas) > 1:
        raise ValueError(f"config.json contradicts itself: it has rope_theta {' and '.join(map(str, sorted(thetas)))}")
    scaling = next(iter(scalings.values()), None)
    return next(iter(thetas), 10000.0), scaling and with_window(config, scaling)


def with_window(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Return a scaling with the keys that it leaves to the rest of a `config.json`, as transformers reads them."""
    kind = scaling["rope_type"]
    if kind == "linear":  # whose frequencies do not depend on a window
        return {key: value for key, value in scaling.items() if key != ORIGINAL}
    if kind == "dynamic" and not is_of_ours(config):  # its window is this length, whatever the entry says
        return scaling | {ORIGINAL: integer(config, "max_position_embeddings")}
    if kind in ("llama3", "yarn", "longrope"):
        length = integer(config, "max_position_embeddings")
        window = integer(config, ORIGINAL, None) or scaling.get(ORIGINAL) or length
        scaling = scaling | {ORIGINAL: window}
        if kind != "llama3" and scaling.get("factor") is None and is_above(length, window):  # DeepSeek's, Phi-3's
            scaling["factor"] = length / window
    return scaling


def longest_text(config: dict[str, Any], scaling: dict[str, Any] | None) -> int:
    """Return the number of tokens that a model takes, stretched positions included.

    scaling: as `with_window` returns it. `max_position_embeddings` is the length after stretching where it is above
    `original_max_position_embeddings` (Llama 3.1), and otherwise the window before it (Qwen2.5's card, Vicuna 16k):
    then the text is longer by the factor.
    """
    length, own = integer(config, "max_position_embeddings"), integer(config, "max_seq_len", None)
    if own or is_of_ours(config):
        return own or length
    if not scaling:
        return length
    factor, kind = scaling.get("factor"), scaling["rope_type"]
    if kind not in ("linear", "dynamic", "yarn", "llama3", "longrope") or not is_above(factor, 1):
        return length
    entries = [config, *(config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))]
    window = next((entry[ORIGINAL] for entry in entries if entry.get(ORIGINAL)), length)
    return length if is_above(length, window) else round(length * factor)


def is_of_ours(config: dict[str, Any]) -> bool:
    """Return whether `write_rope` wrote a config when `max_position_embeddings` was always the length after stretching.

    It writes the scaling under two keys; transformers writes one of them, which one depends on its version.
    """
    return bool(config.get("rope_parameters") and config.get("rope_scaling")) and "max_seq_len" not in config


def is_above(value: Any, limit: Any) -> bool:
    """Return whether both are numbers and the first is larger; other values are refused where they are used."""
    return isinstance(value, int | float) and isinstance(limit, int | float) and value > limit


def scaling_of(key: str, value: dict[str, Any]) -> dict[str, Any] | None:
    """Return an entry on rotary positions with its type under `rope_type`, without the base; None where it is plain."""
    types = [value[name] for name in ("rope_type", "type") if value.get(name)]
    if types[1:] and types[0] != types[1]:
        raise ValueError(f"config.json contradicts itself: {key} has rope_type {types[0]} and type {types[1]}")
    if value.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: {key} sets partial_rotary_factor, which this module does not do")
    rest = {k: v for k, v in value.items() if k not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")}
    if rest and not types:
        raise ValueError(f"config.json: {key} sets {', '.join(rest)}, and no rope_type says what to do with it")
    return {"rope_type": types[0]} | rest if types and types[0] != "default" else None


_REQUIRED: Any = object()


def integer(config: dict[str, Any], key: str, default: Any = _REQUIRED) -> Any:
    """Return an integer of a config; `default` where the key is absent or null.

    Raises ValueError that names a key that is missing without a default, or has another type.
    """
    return _of_type(config, key, default, int, "an integer")


def number(config: dict[str, Any], key: str, default: Any = _REQUIRED) -> Any:
    """Return a number of a config as a float; otherwise as `integer`."""
    value = _of_type(config, key, default, (int, float), "a number")
    return value if value is None else float(value)


def flag(config: dict[str, Any], key: str) -> bool:
    """Return a truth value of a config; False where the key is absent or null. ValueError where it is anything else."""
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} should be true or false, found {value!r}")
    return value


def _of_type(config: dict[str, Any], key: str, default: Any, kind: Any, name: str) -> Any:
    value = config.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if value is None:
        raise ValueError(f"config.json lacks the key {key!r}")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"config.json: {key} should be {name}, found {value!r}")
    return value


def write(args: ModelArgs) -> dict[str, Any]:
    """Return the `config.json` of a shape; positions stand there under the present keys and under the older ones."""
    if args.attention_bias and args.qk_norm:
        raise ValueError("no Hugging Face model combines attention_bias (on q, k, v) and qk_norm")
    kind = "qwen2" if args.attention_bias else "qwen3" if args.qk_norm else "mistral"
    if kind == "mistral" and args.sliding_window is None and args.dim % args.n_heads == 0:
        kind = "llama"  # transformers' class insists that n_heads divides dim, even where head_dim is set
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
        **write_rope(args),
        "tie_word_embeddings": args.tie_embeddings,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
    }
    if kind == "mistral":
        config["sliding_window"] = args.sliding_window
    elif kind != "llama" and args.sliding_window is not None:
        config |= {"sliding_window": args.sliding_window, "use_sliding_window": True, "max_window_layers": 0}
    return config


def write_rope(args: ModelArgs) -> dict[str, Any]:
    """Return the keys on lengths and positions.

    transformers has no name for `ntk`, which is no more than a larger base: it is written, and read again, as that. For
    `dynamic` and `linear`, other programs expect the original window in `max_position_embeddings`; the length that the
    model is made for stands beside it in a key of our own, `max_seq_len`.
    """
    import rope  # not at the top: it loads torch, which takes seconds, and `read` needs none

    scaling = args.rope_scaling and dict(args.rope_scaling)  # a copy, because keys are taken out below
    theta, length = args.rope_theta, {"max_position_embeddings": args.max_seq_len}
    if rope.rope_type(scaling) == "ntk":
        scaling, theta = None, rope.ntk_theta(args.head_dim, theta, scaling["factor"])
    elif rope.rope_type(scaling) == "dynamic" and scaling.get(ORIGINAL):
        length = {"max_position_embeddings": scaling.pop(ORIGINAL), "max_seq_len": args.max_seq_len}
    elif rope.rope_type(scaling) == "linear":
        window = max(1, round(args.max_seq_len / scaling["factor"]))
        length = {"max_position_embeddings": window, "max_seq_len": args.max_seq_len}
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    return length | {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}

"""config.json as each of the family's models publishes it, small: read, computed and written as transformers does."""

import json
import math

import pytest
import torch

import rope
from checkpoint import config_json
from checkpoint.directory import load_model, save_model
from model import Transformer
from model_args import ModelArgs

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
# The keys are those of the models' own files; the sizes are TINY's.
PUBLISHED = {
    "llama 1": {"model_type": "llama", "hidden_act": "silu", "max_sequence_length": 64, "rms_norm_eps": 1e-6},
    "llama 2": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "float16",
    },
    "llama 3.2": {
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 8,
        "mlp_bias": False,
        "num_key_value_heads": 2,
        "eos_token_id": [1, 2],
        "max_position_embeddings": 128,
        "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "tinyllama": {"model_type": "llama", "num_key_value_heads": 1, "max_position_embeddings": 64, "rope_theta": 1e4},
    "smollm2": {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "yi": {"model_type": "llama", "num_key_value_heads": 2, "rope_theta": 5e6, "max_position_embeddings": 64},
    "mistral": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "sliding_window": 5,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    },
    "mistral 0.3": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "rope_theta": 1e6},
    "qwen2.5": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "max_window_layers": 2,
        "sliding_window": 5,
        "use_sliding_window": False,
        "use_mrope": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
    },
    "qwen2 with windows": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": False,
        "max_window_layers": 2,
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
    },
    "as transformers 5 writes": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0},
        "dtype": "float32",
    },
}


def peer_of(config: dict, folder) -> torch.nn.Module:
    """transformers' model of such a file, its weights lively, saved by itself into `folder`, with that very file."""
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    peer = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).float().eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    peer.save_pretrained(folder)
    return peer


@pytest.mark.parametrize("rewritten", [False, True], ids=["as published", "as transformers rewrites it"])
@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_the_family_in_and_out(tmp_path, config, rewritten):
    """transformers saves, we load: the same logits; we save, transformers loads: nothing missing or left, the same."""
    (tmp_path / "theirs").mkdir()
    peer = peer_of(TINY | config, tmp_path / "theirs")
    if not rewritten:
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(TINY | config))
    model, tokens = load_model(tmp_path / "theirs"), torch.randint(61, (2, 40))
    expected = peer(tokens).logits
    # float32 sums in another order: 1e-7 of logits of a few units; a wrong window or angle differs by 0.1 and more
    torch.testing.assert_close(model(tokens), expected, atol=2e-5, rtol=1e-5)
    save_model(tmp_path / "ours", model)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(again(tokens).logits, expected, atol=2e-5, rtol=1e-5)
    assert load_model(tmp_path / "ours").args == model.args


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2, "head_dim": 14, "tie_embeddings": False, "rope_theta": 500.0, "norm_eps": 1e-6},
        {"n_heads": 3, "head_dim": 8},  # a width that its heads do not divide
        {"attention_bias": True},
        {"attention_bias": True, "sliding_window": 3},
        {"qk_norm": True, "head_dim": 12},
        {"qk_norm": True, "sliding_window": 3},
        {"sliding_window": 3},
    ],
    ids=str,
)
def test_config_that_transformers_writes_is_read(changes):
    args = ModelArgs(**{"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 53, "max_seq_len": 64} | changes)
    config = transformers.AutoConfig.for_model(**config_json.write(args))
    assert config_json.read(json.loads(config.to_json_string(use_diff=False))) == args
    assert config_json.read(json.loads(config.to_json_string())) == args
    assert (
        type(transformers.AutoModelForCausalLM.from_config(config)).__name__
        == config_json.write(args)["architectures"][0]
    )


@pytest.mark.parametrize("kind", config_json.FAMILY)
def test_what_a_config_leaves_out_is_what_transformers_takes(kind):
    sparse = TINY | {"model_type": kind, "hidden_size": 64, "num_attention_heads": 32}  # as many as OMITTED's kv heads
    theirs = transformers.AutoConfig.for_model(**sparse)
    assert config_json.read(json.loads(theirs.to_json_string(use_diff=False))) == config_json.read(sparse)


# ---- what is refused, by name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; this module runs llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias to True"),
        ({"attention_bias": True}, "attention_bias, on q, k, v and o"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias, on q, k, v and o"),
        ({"attention_dropout": 0.1}, "attention_dropout to 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor to 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters sets partial_rotary_factor"),
        ({"attention_multiplier": 0.1}, "attention_multiplier to 0.1"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping to 30.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\); dequantize them first"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "from layer to layer"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, r"from layer to layer \(sliding_attention"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "type 'spiral'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "type 'spiral'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs from layer type to layer type"),
    ],
)
def test_what_the_module_cannot_represent_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config_json.read(TINY | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            r"contradicts itself: rope_parameters \{.*default.*\} and rope_scaling \{.*linear.*\}",
        ),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, r"rope_theta 10000.0 and 500000.0"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "rope_type yarn and type linear"),
        ({"rope_scaling": "linear"}, "rope_scaling should be a mapping, found 'linear'"),
        ({"hidden_size": "64"}, "hidden_size should be an integer, found '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers should be an integer, found True"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps should be a number, found '1e-5'"),
        ({"vocab_size": None}, "lacks the key 'vocab_size'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings should be true or false, found 'false'"),
        ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window should be true or false, found 'no'"),
        ({"quantization_config": "int4"}, r"quantized \(int4\)"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling sets factor, and no rope_type says what to do with it"),
        ({"rope_scaling": {"type": "linear", "rope_type": ["yarn"]}}, r"rope_type \['yarn'\] and type linear"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        config_json.read(TINY | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rms_norm_eps": math.nan}, "norm_eps should be a number from 0 to 1, found nan"),
        ({"rms_norm_eps": -1e-5}, "norm_eps should be a number from 0 to 1, found -1e-05"),
        ({"num_attention_heads": 0}, "n_heads must be at least 1, found 0"),
        ({"rope_scaling": {"rope_type": 3, "factor": 2.0}}, "the type should be a name, found 3"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}, r"the type should be a name, found \['yarn'\]"),
        *(
            ({"rope_theta": theta}, "rope_theta should be a number above 1")
            for theta in (0, -1e4, 1.0, math.nan, math.inf)
        ),
    ],
)
def test_numbers_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        config_json.read(TINY | changes)


def test_both_spellings_may_stand_side_by_side_when_they_agree():
    old, new = {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    both = TINY | {"rope_scaling": old, "rope_theta": 5e5, "rope_parameters": new}
    assert config_json.read_rope(both) == (5e5, {"rope_type": "linear", "factor": 2.0})


def test_no_hugging_face_model_combines_everything():
    with pytest.raises(ValueError, match="no Hugging Face model combines"):
        config_json.write(Transformer(ModelArgs(n_layers=1, attention_bias=True, qk_norm=True)).args)


@pytest.mark.parametrize("kinds", [3, "full_attention", {"a": 1}, [1, 2], [["full_attention"]], [None]])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_layer_types_that_are_no_names_are_refused(kind, kinds):
    config = config_json.write(ModelArgs(dim=16, n_heads=2)) | {"model_type": kind, "layer_types": kinds}
    with pytest.raises(ValueError, match="layer_types should be a list of names"):
        config_json.read(config)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize(
    "scaling, more, length",
    [
        # the window before stretching: the factor times as long fits
        ({"type": "linear", "factor": 4.0}, {}, 256),  # Vicuna 16k
        ({"type": "dynamic", "factor": 4.0}, {}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {}, 256),  # Qwen2.5's card
        ({"rope_type": "yarn", "factor": 4.0}, {}, 256),
        (LLAMA3 | {"original_max_position_embeddings": 64}, {}, 512),
        (LONG | {"factor": 4.0}, {}, 256),
        # the length after stretching, which is above the window
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, {}, 64),
        ({"type": "yarn", "factor": None, "original_max_position_embeddings": 16}, {}, 64),  # DeepSeek
        (LLAMA3 | {"original_max_position_embeddings": 8}, {}, 64),  # Llama 3.1
        (LONG, {"original_max_position_embeddings": 16}, 64),  # Phi-3
        (LONG | {"original_max_position_embeddings": 32}, {"original_max_position_embeddings": 16}, 64),
        ({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 16}, {}, 64),
        ({"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}, {}, 64),
        (None, {}, 64),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_lengths_and_frequencies_are_those_that_transformers_has(scaling, more, length, key):
    """64 positions in config.json; frequencies at lengths within the window, beyond it and at the end."""
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config |= {"intermediate_size": 8, "vocab_size": 9, "max_position_embeddings": 64, key: scaling} | more
    if key == "rope_parameters":
        config[key] = (scaling or {"rope_type": "default"}) | {"rope_theta": 10000.0}
    args = config_json.read(config)
    assert args.max_seq_len == length
    assert config_json.read(config_json.write(args)) == args
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    peer_config = transformers.LlamaConfig.from_dict(dict(config))
    for n in (8, 40, length):
        if n > length:
            continue
        peer = rotary(peer_config)
        cos, sin = peer(torch.zeros(1), torch.arange(n)[None])
        frequencies, factor = rope.make(args.head_dim, args.rope_theta, args.rope_scaling, length).frequencies(n)
        # float32: angles up to 512
        angles = torch.arange(n)[:, None] * torch.tensor(frequencies)
        torch.testing.assert_close(factor * angles.cos().float(), cos[0, :, :4], atol=1e-4, rtol=0)
        torch.testing.assert_close(factor * angles.sin().float(), sin[0, :, :4], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_a_config_that_was_written_with_the_length_after_stretching_keeps_it(kind):
    """Ours of before; it has the scaling under both keys, and no `max_seq_len`."""
    entry = {"rope_type": kind, "factor": 4.0}
    config = config_json.write(ModelArgs(max_seq_len=64)) | {"rope_scaling": entry}
    config["rope_parameters"] = entry | {"rope_theta": 10000.0}
    args = config_json.read(config)
    assert (args.max_seq_len, args.rope_scaling) == (64, entry)

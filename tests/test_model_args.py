"""The shape of a model: widths, limits, and its way to config.json and back."""

import dataclasses
import json

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import config_json
from model import Transformer
from model_args import ModelArgs, NewModelArgs

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 53, "multiple_of": 8, "max_seq_len": 64}


@pytest.mark.parametrize(
    "dim, multiple_of, multiplier, expected",
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (4096, 1024, 1.3, 14336),
        (512, 256, None, 1536),
        (288, 32, None, 768),
    ],
)
def test_feed_forward_width_of_known_models(dim, multiple_of, multiplier, expected):
    args = ModelArgs(dim=dim, n_heads=8, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
    assert args.hidden_dim == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": 30}, "dim 30 does not divide into n_heads 4"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"n_kv_heads": 8}, "n_heads 4 is not a multiple of n_kv_heads 8"),
        ({"dim": 20}, "head_dim 5 is odd"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "type 'spiral'; known types are"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, found 0"),
        ({"n_layers": -1}, "n_layers must be at least 1, found -1"),
        ({"n_kv_heads": 0}, "n_kv_heads must be at least 1, found 0"),
        ({"n_heads": 0}, "n_heads must be at least 1, found 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, found 0"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(**SHAPE | changes)


@settings(deadline=None)
@given(
    n_kv_heads=st.sampled_from([1, 2, 4, 8]),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([None, 6, 64]),
    hidden_dim=st.integers(1, 99) | st.none(),
    multiple_of=st.sampled_from([1, 32, 256]),
    theta=st.sampled_from([1e4, 5e5]),
    tie=st.booleans(),
    kind=st.sampled_from([{}, {"attention_bias": True}, {"qk_norm": True}, {"sliding_window": 5}]),
)
def test_shape_survives_config_json(n_kv_heads, group, head_dim, hidden_dim, multiple_of, theta, tie, kind):
    n_heads = n_kv_heads * group
    args = ModelArgs(
        dim=n_heads * 8,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        multiple_of=multiple_of,
        ffn_dim_multiplier=1.5,
        rope_theta=theta,
        tie_embeddings=tie,
        **kind,
    )
    assert config_json.read(json.loads(json.dumps(config_json.write(args)))) == args


WINDOW = {"original_max_position_embeddings": 64}
STRETCHED = {
    "linear": {"factor": 2},
    "dynamic": {"factor": 2},
    "yarn": {"factor": 4} | WINDOW,
    "llama3": {"factor": 4, "low_freq_factor": 1, "high_freq_factor": 4} | WINDOW,
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} | WINDOW,
    "clex": {"max_factor": 4} | WINDOW,
}


@pytest.mark.parametrize("name", STRETCHED)
def test_positions_may_be_stretched_before_the_length_is_known(name):
    scaling = {"rope_type": name} | STRETCHED[name]
    args = NewModelArgs(**SHAPE | {"dim": 64, "max_seq_len": None}, rope_scaling=scaling)
    assert args.made(53, 256) == ModelArgs(**SHAPE | {"dim": 64, "max_seq_len": 256}, rope_scaling=scaling)
    with pytest.raises(ValueError, match=f"type '{name}' does not know spin"):
        NewModelArgs(rope_scaling=scaling | {"spin": 1})


def test_a_length_that_stretched_positions_do_not_cover_is_refused_once_it_is_known():
    words = "--rope_scaling rope_type yarn factor 2 original_max_position_embeddings 64 --n_heads 4 --dim 64"
    args = tyro.cli(NewModelArgs, args=words.split())
    assert args.rope_scaling == {"rope_type": "yarn", "factor": 2} | WINDOW
    assert args.made(53, 128).max_seq_len == 128
    with pytest.raises(ValueError, match="covers 128 positions, max_seq_len is 256"):
        args.made(53, 256)


def test_equality_means_the_same_model():
    assert ModelArgs(hidden_dim=64, multiple_of=1) == ModelArgs(hidden_dim=64, multiple_of=2)
    for name, value in {"hidden_dim": 96, "rope_theta": 5e5, "norm_eps": 1e-6, "tie_embeddings": False}.items():
        assert ModelArgs(hidden_dim=64) != dataclasses.replace(ModelArgs(hidden_dim=64), **{name: value})


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_heads": 4, "n_kv_heads": 2, "head_dim": 10, "dim": 24, "attention_bias": True, "tie_embeddings": False},
        {"dim": 48, "n_heads": 6, "n_kv_heads": 1, "qk_norm": True, "hidden_dim": 7, "vocab_size": 11, "n_layers": 1},
    ],
)
def test_a_shape_knows_its_number_of_parameters(shape):
    args = ModelArgs(**shape)
    assert args.n_parameters() == sum(p.numel() for p in Transformer(args).parameters())


def test_the_shape_of_llama_2_has_its_published_size():
    shape = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "multiple_of": 256}
    assert ModelArgs(**shape, tie_embeddings=False).n_parameters() == 6_738_415_616  # of meta-llama/Llama-2-7b-hf

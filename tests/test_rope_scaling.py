"""Stretched positions against transformers' formulas; what contradicts itself; how a checkpoint is extended."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rope
from checkpoint import config_json
from model import Transformer
from model_args import ModelArgs

transformers = pytest.importorskip("transformers")

L0 = 64  # the original window
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": L0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": L0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0 + i / 7 for i in range(8)]}
LONGROPE |= {"long_factor": [1.5**i for i in range(8)], "original_max_position_embeddings": L0}
CLEX = {"rope_type": "clex", "max_factor": 4, "original_max_position_embeddings": L0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": L0}
ENTRIES = {  # for a head of 16 dimensions and texts of up to 256 tokens
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear by its older key": {"type": "linear", "factor": 4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "plain dynamic": {"rope_type": "dynamic", "factor": 1.0},
    "yarn": YARN,
    "yarn attention_factor": YARN | {"attention_factor": 1.3},
    "yarn mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn mscale alone": YARN | {"mscale": 0.707},
    "yarn betas": YARN | {"beta_fast": 8, "beta_slow": 2.5},
    "yarn not truncated": YARN | {"truncate": False},
    "yarn of no factor": YARN | {"factor": 1.0, "original_max_position_embeddings": 256},
    "yarn of absent options": YARN | {"attention_factor": None, "beta_fast": None, "mscale": None},
    "llama3": LLAMA3,
    "llama3 wide": LLAMA3 | {"low_freq_factor": 0.5, "high_freq_factor": 16, "factor": 32.0},
    "longrope": LONGROPE,
    "longrope factor": LONGROPE | {"factor": 16.0},
    "longrope attention_factor": LONGROPE | {"attention_factor": 1.0},
}


def error_against_transformers(
    scaling: dict, head_dim: int = 16, theta: float = 10000.0, max_seq_len: int = 256
) -> float:
    """Largest difference of an inverse frequency or attention factor, for texts within and beyond the window."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = rope.make(head_dim, theta, scaling, max_seq_len)
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=scaling.get("original_max_position_embeddings", max_seq_len)
        if scaling.get("rope_type") == "dynamic"
        else max_seq_len,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    worst = 0.0
    for length in (1, L0, L0 + 1, 100, 256):
        inv_freq, factor = ours.frequencies(length)
        theirs, their_factor = ROPE_INIT_FUNCTIONS[rope.rope_type(scaling)](config, seq_len=length)
        worst = max(worst, (torch.tensor(inv_freq).float() - theirs).abs().max().item(), abs(factor - their_factor))
    return worst


def ntk_error_against_transformers(head_dim: int, theta: float, factor: float) -> float:
    """transformers has no name for it; there the larger base is written as `rope_theta`."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    base = rope.ntk_theta(head_dim, theta, factor)
    config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": base})
    inv_freq, one = rope.make(head_dim, theta, {"rope_type": "ntk", "factor": factor}, 256).frequencies(1)
    return max((torch.tensor(inv_freq) - LlamaRotaryEmbedding(config).inv_freq).abs().max().item(), abs(one - 1))


@pytest.mark.parametrize("scaling", ENTRIES.values(), ids=ENTRIES)
def test_equals_transformers(scaling):
    # theirs are computed in float32, frequencies are at most 1
    assert error_against_transformers(scaling) <= 2e-7


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("head_dim, theta", [(4, 10000.0), (10, 500.0), (64, 5e5), (128, 1e6)])
def test_equals_transformers_in_other_shapes(name, head_dim, theta):
    assert error_against_transformers(ENTRIES[name], head_dim, theta) <= 2e-7


def test_ntk_is_a_larger_base():
    for head_dim, theta, factor in itertools.product((4, 16, 128), (10000.0, 5e5), (1.0, 2.0, 8.0)):
        assert ntk_error_against_transformers(head_dim, theta, factor) <= 2e-7
        stretched = rope.make(head_dim, theta, {"type": "ntk", "factor": factor}, 256).frequencies(1)[0]
        plain = rope.make(head_dim, theta, None, 256).frequencies(1)[0]
        assert stretched[0] == plain[0]  # the fastest stays, the slowest is interpolated in full
        assert stretched[-1] == pytest.approx(plain[-1] / factor, rel=1e-12)


def test_yarn_beyond_its_ramp():
    """Frequencies of many turns stay, of less than one turn are divided; the factor is 0.1 ln s + 1."""
    inv_freq, factor = rope.make(128, 10000.0, YARN | {"original_max_position_embeddings": 4096}, 16384).frequencies(1)
    plain = [10000.0 ** (-i / 64) for i in range(64)]
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    for ours, base in zip(inv_freq, plain):
        turns = 4096 * base / (2 * math.pi)
        if turns > 36:  # one dimension beyond beta_fast, the ramp's ends being rounded
            assert ours == base
        elif turns < 0.85:
            assert ours == pytest.approx(base / 4, rel=1e-12)
        else:
            assert base / 4 <= ours <= base


def test_dynamic_grows_with_the_text_only():
    dynamic = rope.make(16, 10000.0, DYNAMIC, 512)
    assert not dynamic.cache_rotated
    plain = rope.make(16, 10000.0, None, 512).frequencies(1)
    assert all(dynamic.frequencies(n) == plain for n in (1, L0 - 1, L0))
    twice = rope.make(16, 10000.0, {"type": "ntk", "factor": 5.0}, 512).frequencies(1)  # 4 * 2 - 3
    assert dynamic.frequencies(2 * L0)[0] == pytest.approx(twice[0], rel=1e-12)


def test_longrope_has_no_frequencies_beyond_the_length_it_is_made_for():
    with pytest.raises(ValueError, match="cover texts of 256 tokens, found a text of 257"):
        rope.make(16, 10000.0, LONGROPE, 256).frequencies(257)


@pytest.mark.parametrize("scaling", [None, *ENTRIES.values()])
def test_frequencies_by_row_are_those_of_each_length(scaling):
    encoding = rope.make(16, 10000.0, scaling, 256)
    lengths = torch.tensor([[200], [3], [65], [200]])
    positions = torch.arange(7)[None]
    cos, sin = rope.cos_sin(*encoding.prepare(positions, lengths))
    for row, length in enumerate(lengths[:, 0].tolist()):
        alone = rope.cos_sin(*encoding.prepare(positions, length))
        for ours, expected in zip((cos, sin), alone):
            assert torch.equal(ours[row if len(ours) > 1 else 0], expected[0])


def test_lengths_of_texts_in_packed_rows():
    doc_ids = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [5, 5, 5, 5, 5, 5, 2]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 0]])
    expected = [[2, 2, 3, 3, 3, 1, 1], [6, 6, 6, 6, 6, 6, 1]]
    assert rope.text_lengths(positions, doc_ids).tolist() == expected
    assert rope.text_lengths(positions, None).tolist() == [[3], [6]]


# ---- models


def stretched_model(scaling: dict | None) -> Transformer:
    torch.manual_seed(0)
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 53, "max_seq_len": 256}
    model = Transformer(ModelArgs(**shape, rope_scaling=scaling)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.requires_grad_(False)


def logits_error_against_transformers(scaling: dict, length: int) -> float:
    """Largest difference of a logit, of texts of `length` tokens, from transformers' model of our `config.json`."""
    model = stretched_model(scaling)
    config = transformers.AutoConfig.for_model(**config_json.write(model.args), attn_implementation="eager")
    peer = transformers.AutoModelForCausalLM.from_config(config)
    peer.load_state_dict(model.state_dict(), strict=True)
    tokens = torch.randint(53, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (model(tokens) - peer(tokens).logits).abs().max().item()


MODELS = {"ntk": {"rope_type": "ntk", "factor": 4.0}, "dynamic of a window": DYNAMIC} | ENTRIES


@pytest.mark.parametrize("length", [L0 // 2, 3 * L0])
@pytest.mark.parametrize("scaling", MODELS.values(), ids=MODELS)
def test_logits_equal_transformers(scaling, length):
    # float32: logits of size 4, and angles up to 200, whose frequencies are rounded elsewhere
    assert logits_error_against_transformers(scaling, length) < 3e-4


def test_logits_show_how_positions_are_stretched():
    tokens = torch.randint(53, (2, 3 * L0), generator=torch.Generator().manual_seed(1))
    entries = [None, ENTRIES["linear"], MODELS["ntk"], DYNAMIC, YARN, LLAMA3, LONGROPE]
    logits = [stretched_model(scaling)(tokens) for scaling in entries]
    for a, b in itertools.combinations(logits, 2):
        assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize("scaling", [*MODELS.values(), CLEX], ids=[*MODELS, "clex"])
def test_survives_config_json(scaling):
    args = ModelArgs(dim=64, n_heads=4, max_seq_len=256, rope_scaling=scaling)
    again = config_json.read(json.loads(json.dumps(config_json.write(args))))
    assert again.max_seq_len == 256
    ours, theirs = (rope.make(16, a.rope_theta, a.rope_scaling, 256) for a in (args, again))
    if scaling is CLEX:
        assert again == args
    else:
        assert all(ours.frequencies(n) == theirs.frequencies(n) for n in (1, L0, 200))
        assert config_json.write(again) == config_json.write(config_json.read(config_json.write(again)))


# ---- what contradicts itself


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "yarm", "factor": 2.0}, "type 'yarm'; did you mean 'yarn'"),
        ({"type": "spiral"}, "type 'spiral'; known types are .*dynamic, .*linear, .*yarn"),
        ({"rope_type": "linear", "type": "dynamic", "factor": 2.0}, "two types, rope_type 'linear' and type 'dynamic'"),
        ({"rope_type": "linear"}, "type 'linear' needs factor"),
        ({"rope_type": "linear", "factor": None}, "type 'linear' needs factor"),
        ({"rope_type": "yarn", "factor": 2.0}, "needs original_max_position_embeddings"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "does not know beta_fast; its keys are factor"),
        (YARN | {"beta_fats": 3}, "does not know beta_fats; did you mean 'beta_fast'"),
        ({"rope_type": "default", "factor": 2.0}, "type 'default' does not know factor; its keys are none"),
        ({"rope_type": "linear", "factor": 0.5}, "factor should be a number, at least 1, found 0.5"),
        ({"rope_type": "linear", "factor": True}, "factor should be a number, at least 1, found True"),
        ({"rope_type": "linear", "factor": "2"}, "factor should be a number, at least 1, found '2'"),
        ({"rope_type": "dynamic", "factor": math.nan}, "factor should be a number, at least 1, found nan"),
        (YARN | {"original_max_position_embeddings": 64.5}, "should be a whole number, at least 1, found 64.5"),
        (YARN | {"original_max_position_embeddings": 512}, "embeddings 512 is longer than max_seq_len 256"),
        (LLAMA3 | {"original_max_position_embeddings": 8192}, "embeddings 8192 is longer than max_seq_len 256"),
        (YARN | {"factor": 2.0}, "covers 128 positions, max_seq_len is 256; raise the factor to 4"),
        (YARN | {"beta_fast": 1, "beta_slow": 1}, "beta_fast must be larger than beta_slow, found 1 and 1"),
        (YARN | {"truncate": 1}, "truncate should be true or false, found 1"),
        (YARN | {"attention_factor": 0.0}, "attention_factor should be a number, above 0, found 0.0"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor must be larger than low_freq_factor, found 1.0 and 1.0"),
        (LONGROPE | {"short_factor": [1.0] * 7}, "short_factor has 7 numbers; head_dim 16 has 8"),
        (LONGROPE | {"long_factor": [1.0] * 7 + [0.0]}, "long_factor should be a list of numbers above 0"),
        (LONGROPE | {"long_factor": 4.0}, "long_factor should be a list of numbers above 0, found 4.0"),
        (CLEX | {"max_factor": 2}, "covers 128 positions, max_seq_len is 256; raise max_factor to 4"),
        (CLEX | {"max_factor": 4.5}, "max_factor should be a whole number, at least 1, found 4.5"),
        (CLEX | {"act": "tan"}, "act should be one of tanh, silu, relu, found 'tan'"),
        ({"type": "ntk", "factor": 1e308}, "type 'ntk' has no frequencies for {'factor': 1e.308}"),
        (LONGROPE | {"original_max_position_embeddings": 1}, "type 'longrope' has no frequencies for "),
    ],
)
def test_contradictions_are_named_before_anything_is_built(scaling, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(dim=64, n_heads=4, max_seq_len=256, rope_scaling=scaling)


@pytest.mark.parametrize("name", ["ntk", "dynamic", "clex"])
def test_a_single_frequency_has_no_base_to_change(name):
    scaling = {"ntk": {"type": "ntk", "factor": 2.0}, "dynamic": DYNAMIC, "clex": CLEX}[name]
    with pytest.raises(ValueError, match="head_dim 2 has one frequency only"):
        rope.make(2, 10000.0, scaling, 256)


# ---- extending a checkpoint


@given(
    name=st.sampled_from(["linear", "ntk", "dynamic", "yarn", "llama3", "clex"]),
    old=st.integers(1, 300),
    growth=st.integers(1, 2000),
    given_factor=st.booleans(),
)
def test_an_automatic_factor_covers_the_new_length(name, old, growth, given_factor):
    new = old + growth
    factor = 2.0 * math.ceil(new / old) if given_factor else None
    scaling = rope.extend(None, old, new, name, factor)
    encoding = rope.make(16, 10000.0, scaling, new)  # which refuses what does not reach
    assert encoding.limit is None or encoding.limit >= new
    assert scaling["rope_type"] == name
    size = scaling.get("max_factor") or scaling["factor"]
    assert size == (factor or (math.ceil(new / old) if name == "clex" else new / old))
    assert scaling.get("original_max_position_embeddings", old) == old


def test_extending_what_is_stretched_already_counts_from_the_first_window():
    assert rope.extend(YARN, 256, 1024)["factor"] == 16.0
    assert rope.extend(YARN | {"beta_fast": 16}, 256, 512, "yarn") == YARN | {"beta_fast": 16, "factor": 8.0}
    assert rope.extend({"type": "linear", "factor": 2.0}, 128, 512) == {"rope_type": "linear", "factor": 8.0}
    assert rope.extend(CLEX, 256, 700) == CLEX | {"max_factor": 11}
    assert rope.extend(LLAMA3, 256, 512)["high_freq_factor"] == 4.0
    assert rope.extend({"rope_type": "dynamic", "factor": 1.0}, 64, 256) == DYNAMIC
    assert rope.extend(None, 256, 1024)["rope_type"] == "yarn"


@pytest.mark.parametrize(
    "scaling, lengths, asked, message",
    [
        (None, (256, 256), {}, "256 is no longer than the checkpoint's 256"),
        (None, (256, 1024), {"type": "yarn", "factor": 2.0}, "covers 512 positions, max_seq_len is 1024; ask for 4"),
        (YARN, (256, 1024), {"type": "linear"}, "--rope.type linear does not go with a checkpoint stretched by 'yarn'"),
        (None, (256, 1024), {"type": "longrope"}, "its factors are found by a search"),
        (None, (256, 1024), {"type": "default"}, "it stretches nothing"),
        (None, (256, 1024), {"type": "yam"}, "there is no such type; choose one of .*dynamic, .*linear, .*yarn"),
    ],
)
def test_extensions_that_make_no_sense_are_refused(scaling, lengths, asked, message):
    with pytest.raises(ValueError, match=message):
        rope.extend(scaling, *lengths, **asked)

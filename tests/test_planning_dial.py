"""One dial: parameters and tokens -> a run. The shapes are counted by building none; the rules by hand."""

import dataclasses

import pytest

import pretrain
from model_args import ModelArgs, NewModelArgs
from planning.dial import number, shape_for, tokens_of, turn


@pytest.mark.parametrize("text, value", [("15M", 15e6), ("1.1b", 1.1e9), (" 300k ", 3e5), ("20000", 2e4)])
def test_numbers(text, value):
    assert number(text, "params") == value


@pytest.mark.parametrize("text", ["", "M", "15 million", "-3M", "1e6", "5", "9999B", "nan"])
def test_what_is_no_number_is_named(text):
    with pytest.raises(ValueError, match=r"--params should be a number such as 300k, 15M or 1\.1B"):
        number(text, "params")


def test_tokens():
    assert tokens_of("20x", 1_000_000) == 2e7 and tokens_of("300M", 7) == 3e8
    with pytest.raises(ValueError, match=r"--tokens should be 0\.01x"):
        tokens_of("0x", 1_000_000)


@pytest.mark.parametrize("params", ["1M", "2M", "5M", "15M", "60M", "125M", "350M", "1.1B", "7B"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_has_about_so_many_parameters(params, tied):
    vocab = 4800 if params.endswith("M") and len(params) < 4 else 32000
    shape = shape_for(number(params, "params"), vocab, NewModelArgs(tie_embeddings=tied))
    assert shape.n_parameters() == pytest.approx(number(params, "params"), rel=0.25)
    assert 32 <= shape.dim / shape.n_layers <= 128 and shape.head_dim in (32, 64)
    assert shape.tie_embeddings == tied


def test_a_vocabulary_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="choose a smaller vocabulary or more parameters"):
        shape_for(1e6, 64000, ModelArgs())


def test_the_rules():
    small = turn("15M", "20x", 6400, 512, NewModelArgs())
    n = ModelArgs(**small.model, vocab_size=6400).n_parameters()
    assert small.tokens == 20 * n and small.max_steps * small.batch_size * 512 == pytest.approx(small.tokens, rel=0.01)
    assert 700 < small.max_steps < 1500  # a thousandth of the tokens in a step, to a power of two
    large = turn("350M", "20x", 32000, 2048, NewModelArgs(tie_embeddings=False))
    assert large.batch_size * 2048 == pytest.approx(2**19 * (large.tokens / 1.2e9) ** 0.383, rel=0.42)
    assert large.micro_batch_size * 2048 == 16384
    rates = turn("1M", "1M", 512, 64, NewModelArgs())
    assert rates.optim["warmup_steps"] == 20
    for recipe in (small, large):
        assert recipe.optim["lr"] == pytest.approx(4e-3 * (128 / recipe.model["dim"]) ** (2 / 3), rel=0.05)
        assert recipe.optim["muon_lr"] == pytest.approx(6e-3 * (128 / recipe.model["dim"]) ** (1 / 3), rel=0.05)


def test_pretraining_turns_it():
    args = pretrain.Args(params="2M", tokens="20x")
    turned, told = pretrain.dialled(args, 4800)
    assert (turned.params, turned.tokens) == (None, None) and "parameters" in told
    assert turned.model.made(4800, 128).n_parameters() == pytest.approx(2e6, rel=0.1)
    assert turned.train.max_steps > 100 and turned.optim.lr != args.optim.lr
    assert pretrain.dialled(pretrain.Args(), 4800) == (pretrain.Args(), "")
    assert dataclasses.replace(turned.model) == turned.model


@pytest.mark.parametrize("flags", [{"tokens": "20x"}, {"params": "2M", "init_from": "x"}])
def test_flags_that_do_not_go_with_it(flags):
    with pytest.raises(ValueError, match="params"):
        pretrain.Args(**flags)

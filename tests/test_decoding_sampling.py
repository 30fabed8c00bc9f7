"""What may follow and the draw, against transformers' warpers and against exact probabilities."""

import math

import pytest
import torch
from helpers.small_model import chi_square
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import sampling
from decoding.params import SamplingParams
from decoding.sampling import draw, probabilities, process_logits

transformers = pytest.importorskip("transformers")


def warpers(params: SamplingParams) -> transformers.LogitsProcessorList:
    chain = transformers.LogitsProcessorList()
    chain.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(transformers.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(transformers.MinPLogitsWarper(params.min_p))
    return chain


@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 50)),
    coarse=st.booleans(),
    params=st.builds(
        SamplingParams,
        temperature=st.floats(0.05, 3),
        top_k=st.integers(0, 60),
        top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    ),
)
@settings(max_examples=150, deadline=None)
def test_process_logits_equals_transformers_bit_for_bit(seed, shape, coarse, params):
    torch.manual_seed(seed)
    logits = torch.randn(shape) * 4
    if coarse:
        logits = logits.round()  # many ties
    history = torch.randint(shape[1], (shape[0], 7))
    before = logits.clone()
    ours = process_logits(logits, history.tolist(), params)
    assert torch.equal(ours, warpers(params)(history, logits))
    assert torch.equal(logits, before)
    assert ours.isfinite().any(-1).all()


def test_history_may_be_ragged_and_empty():
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    out = process_logits(logits, [[], [0, 1, 1]], SamplingParams(temperature=1, top_k=0, repetition_penalty=2.0))
    assert out.tolist() == [[2.0, -2.0, 1.0], [1.0, -4.0, 1.0]]


def test_temperature_zero_leaves_the_argmax_after_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
    assert process_logits(logits, [[]], SamplingParams(temperature=0)).softmax(-1).tolist() == [[0, 1, 0]]
    out = process_logits(logits, [[1]], SamplingParams(temperature=0, repetition_penalty=2.0))
    assert out.softmax(-1).tolist() == [[0, 0, 1]] and out.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.009, 1e-3, 1e-9, 5e-324])
def test_very_low_temperatures_are_nearly_greedy(temperature):
    logits = torch.tensor([[30.0, -80.0, 29.0, -torch.inf], [-1e4, -2e4, -torch.inf, -3e4]])
    for top_p in (1.0, 0.5):
        out = process_logits(logits, [[], []], SamplingParams(temperature=temperature, top_p=top_p, min_p=0.01))
        assert probabilities(out).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    near = torch.tensor([[1.0, 1.0 + 2**-7]])
    expected = 1 / (1 + math.exp(-(2**-7) / temperature)) if temperature > 1e-4 else 1
    out = process_logits(near, [[]], SamplingParams(temperature=temperature))
    assert probabilities(out)[0, 1].item() == pytest.approx(expected, rel=1e-6)


def test_draw_follows_the_exact_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, -2.0, -torch.inf])
    n = 200_000
    drawn = torch.tensor(draw(probabilities(logits.expand(n, 8)), [torch.Generator().manual_seed(3)] * n))
    counts = drawn.bincount(minlength=8)
    assert counts[7] == 0
    # chi-square with 6 degrees of freedom exceeds 27.9 once in 10 000; the seed is fixed
    assert chi_square(counts[:7], logits.softmax(-1)[:7]) < 27.9


def test_first_draws_of_neighbouring_seeds_follow_them_too():
    logits, n = torch.tensor([1.0, 0.0, 0.5, -0.5]), 20_000
    drawn = draw(probabilities(logits.expand(n, 4)), [torch.Generator().manual_seed(seed) for seed in range(n)])
    counts = torch.tensor(drawn).bincount(minlength=4)
    assert chi_square(counts, logits.softmax(-1)) < 21.1  # 3 degrees of freedom, once in 10 000
    pairs = torch.tensor(drawn).view(-1, 2)  # neighbours must not follow each other either
    together = (pairs[:, 0] * 4 + pairs[:, 1]).bincount(minlength=16)
    joint = logits.softmax(-1)[:, None] * logits.softmax(-1)[None, :]
    assert chi_square(together, joint.flatten()) < 44.3  # 15 degrees of freedom


@given(st.lists(st.sampled_from([-math.inf, -60.0, 0.0, 5.0]), min_size=1, max_size=9), st.integers(0, 2**62))
@settings(max_examples=100, deadline=None)
def test_draw_never_hits_an_excluded_id(values, seed):
    values = [*values, 0.0, -math.inf]
    drawn = draw(probabilities(torch.tensor([values])), [torch.Generator().manual_seed(seed)])
    assert values[drawn[0]] > -math.inf


def test_draw_at_both_ends_of_the_unit_interval(monkeypatch):
    logits = torch.tensor([[-math.inf, 0.3, 0.1, 0.2, -math.inf]])
    for u, expected in ((0.0, 1), (1 - 2**-53, 3)):
        monkeypatch.setattr(sampling.torch, "rand", lambda *_, u=u, **__: torch.tensor([u], dtype=torch.float64))
        assert draw(probabilities(logits), [torch.Generator()]) == [expected]


SENSELESS = [("temperature", -0.1), ("temperature", 100.5), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0)]
SENSELESS += [("top_p", 1.1), ("min_p", -0.5), ("repetition_penalty", 0.0), ("max_new_tokens", 0), ("seed", -1)]


@pytest.mark.parametrize(("field", "value"), SENSELESS)
def test_params_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} should be .*found {value}"):
        SamplingParams(**{field: value})

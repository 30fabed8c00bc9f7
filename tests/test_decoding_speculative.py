"""Speculative decoding against plain greedy decoding, token for token, and against exact probabilities."""

import dataclasses
import itertools
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.small_model import chi_square, random_prompts, small_model, uncached
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.cache import KVCache
from checkpoint.directory import load_model
from decoding.feeder import Feeder
from decoding.generate import stream
from decoding.params import SamplingParams, Stop
from decoding.sampling import probabilities, process_logits
from decoding.speculative import DraftModel, PromptLookup, Speculative, verify

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


def drafters(model) -> list:
    """A draft that is always right, one that is sometimes, one with a short context, and the prompt itself."""
    torch.manual_seed(1)
    near = small_model()
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return [DraftModel(model), DraftModel(near), DraftModel(small_model(max_seq_len=8)), PromptLookup(61)]


# ---- greedy


@given(st.integers(1, 40), st.integers(0, 1000), st.integers(1, 6), st.sets(st.integers(0, 60), max_size=5))
@settings(max_examples=15, deadline=None)
def test_greedy_is_plain_greedy_token_for_token(length, seed, n_draft, stop):
    model = small_model()
    prompt = random_prompts([length], seed=seed)[0]
    expected = uncached(model, prompt, min(12, 41 - length), tuple(stop))
    for drafter in drafters(model):
        speculative = Speculative(model, drafter, n_draft)
        cache = model.make_cache(1)
        assert list(speculative.stream(prompt, GREEDY, Stop(stop), cache)) == expected
        assert cache.length == len(prompt) + len(expected) - 1
        assert speculative.tally.accepted <= speculative.tally.drafted <= n_draft * speculative.tally.passes


@pytest.mark.parametrize("shape", [{"n_kv_heads": 4}, {"n_kv_heads": 1}, {"sliding_window": 5}], ids=str)
def test_shapes_of_the_model(shape):
    model = small_model(**shape)
    for prompt in random_prompts([1, 9, 30]):
        expected = list(stream(model, prompt, GREEDY))
        assert list(Speculative(model, DraftModel(small_model()), 3).stream(prompt, GREEDY)) == expected


def test_a_penalty_sees_the_guesses_before_each_place():
    model, params = small_model(), dataclasses.replace(GREEDY, repetition_penalty=1.8)
    for prompt in random_prompts([3, 20]):
        expected = list(stream(model, prompt, params))
        assert expected != list(stream(model, prompt, GREEDY))  # the penalty does something
        for drafter in drafters(model):
            assert list(Speculative(model, drafter).stream(prompt, params)) == expected


def test_one_speculator_for_many_texts_and_a_cache_it_goes_on_from():
    model = small_model()
    prompts = random_prompts([9, 4, 15])
    for drafter in drafters(model):
        speculative = Speculative(model, drafter)
        for prompt, cached in itertools.product(prompts, (0, 1, 3)):
            cache = model.make_cache(1)
            if cached:
                Feeder(model, cache)([prompt[:cached]], [0])
            ids = speculative.stream(prompt, GREEDY, cache=cache)
            begun = list(itertools.islice(ids, 2))
            ids.close()
            assert cache.length == len(prompt) + 1  # guesses that nobody took are forgotten
            rest = list(speculative.stream([*prompt, *begun], GREEDY, cache=cache))
            assert begun + rest == uncached(model, prompt, 14)


def test_a_trained_model_with_itself_and_with_the_prompt(shared):
    model = load_model(shared / "models" / "stories260K_hf")
    expected = json.loads((shared / "models" / "stories260K_expected.json").read_text())["greedy"]
    params = SamplingParams(temperature=0, max_new_tokens=200)
    for entry in expected:
        itself, lookup = Speculative(model, DraftModel(model)), Speculative(model, PromptLookup(512))
        for speculative in (itself, lookup):
            assert (
                entry["prompt_ids"] + list(speculative.stream(entry["prompt_ids"], params, Stop([2]))) == entry["ids"]
            )
        assert itself.tally.accepted == itself.tally.drafted == 160 and itself.tally.passes == 40
        assert str(itself.tally) == "160 of 160 drafted tokens accepted (100%), 5.00 tokens a pass"
        assert lookup.tally.accepted > 0


# ---- the distribution


class Chain:
    """A model whose next id depends on the last one only: `table` (V, V) holds the logits. So exact probabilities are
    easy, and thousands of texts quick; it does what `Feeder` and the loops ask of a model."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.training = table, False
        self.args = SimpleNamespace(vocab_size=len(table), max_seq_len=100)
        self.device, self.dtype = table.device, torch.bool  # no dtype that there is a compiled step for

    def make_cache(self, batch: int, max_len: int = 100, kind: str = "static") -> SimpleNamespace:
        cache = SimpleNamespace(length=0, max_len=max_len, can_rewind=KVCache.can_rewind)
        cache.truncate = partial(KVCache.truncate, cache)
        return cache

    def hidden(self, tokens, positions, cache, lengths):
        assert positions[0].tolist() == list(range(cache.length, cache.length + tokens.shape[1]))
        cache.length += tokens.shape[1]
        return tokens

    def logits(self, hidden):
        return self.table[hidden]

    def eval(self):
        return self

    def train(self, mode):
        pass


@pytest.mark.parametrize("drafter", ["model", "lookup"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1, top_k=0, max_new_tokens=3),
        SamplingParams(temperature=1.3, top_k=4, top_p=0.95, repetition_penalty=1.5, max_new_tokens=3),
    ],
    ids=["plain", "warped"],
)
def test_texts_come_with_exactly_the_models_probabilities(drafter, params):
    torch.manual_seed(0)
    model, other = Chain(torch.randn(4, 4)), Chain(torch.randn(4, 4))
    prompt, n = [0, 3, 1, 0, 2, 0], 2500
    exact = {}
    for text in itertools.product(range(4), repeat=3):
        ids, probability = list(prompt), 1.0
        for token in text:
            p = probabilities(process_logits(model.table[ids[-1]][None], [ids], params))[0]
            probability *= float(p[token])
            ids.append(token)
        exact[text] = probability
    assert sum(exact.values()) == pytest.approx(1)
    speculative = Speculative(model, DraftModel(other) if drafter == "model" else PromptLookup(4), 2)
    seeded = (dataclasses.replace(params, seed=seed) for seed in range(n))
    counts = dict.fromkeys(exact, 0)
    for drawn in seeded:
        counts[tuple(speculative.stream(prompt, drawn))] += 1
    assert 0.1 < speculative.tally.accepted / speculative.tally.drafted < 0.9  # both branches are taken
    assert all(counts[text] == 0 for text in exact if exact[text] == 0)
    often = [text for text in exact if exact[text] * n >= 5]
    rare = sum(exact[text] for text in exact if text not in often)
    observed = torch.tensor([counts[text] for text in often] + [n - sum(counts[text] for text in often)])
    expected = torch.tensor([exact[text] for text in often] + [rare])
    if rare * n < 1:
        observed, expected = observed[:-1], expected[:-1]
    degrees = len(observed) - 1
    # the chi-square of d degrees of freedom exceeds d + 3.72 sqrt(2 d) + 9 less than once in 10 000 times; fixed seeds
    assert chi_square(observed, expected) < degrees + 3.72 * (2 * degrees) ** 0.5 + 9


def test_verify_gives_the_wanted_distribution_for_any_draft():
    generator = torch.Generator().manual_seed(2)
    p = torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.3, 0.4, 0.2]], dtype=torch.float64)
    n, counts, accepted = 20_000, torch.zeros(4), 0
    drafted = torch.multinomial(q[0], n, replacement=True, generator=generator).tolist()
    for token in drafted:
        kept, last = verify([token], p, q, generator)
        counts[token if kept else last] += 1
        accepted += kept
    assert counts[2] == 0
    keep = torch.tensor([0, 1, 3])
    assert chi_square(counts[keep], p[0, keep]) < 18.4  # 2 degrees of freedom, once in 10 000
    share = 1 - float((p[0] - q[0]).abs().sum()) / 2  # one minus the distance in total variation
    assert abs(accepted / n - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_a_draft_that_is_the_model_is_always_accepted():
    torch.manual_seed(0)
    model = Chain(torch.randn(5, 5))
    for warped in ({}, {"top_k": 3, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3, "temperature": 1.7}):
        params = SamplingParams(**{"temperature": 1, "top_k": 0, "max_new_tokens": 50} | warped)
        speculative = Speculative(model, DraftModel(model), 3)
        for seed in range(5):
            list(speculative.stream([1, 2], dataclasses.replace(params, seed=seed)))
        assert speculative.tally.accepted == speculative.tally.drafted > 150


def test_where_only_rounding_parts_them_there_is_still_a_next_id():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5, 1e-17]], dtype=torch.float64)
    kept, last = verify([2], p, q, torch.Generator().manual_seed(0))
    assert kept == 0 and last in (0, 1)


# ---- guesses


@pytest.mark.parametrize(
    ("ids", "n", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 9, 1, 2, 8, 1, 2], 1, [8]),  # the latest of two
        ([5, 1, 2, 9, 7, 2, 8, 5, 1, 2], 1, [9]),  # the longer run is the better reason
        ([1, 2, 3], 4, []),
        ([4], 4, []),
        ([4, 4], 3, [4, 4, 4]),
        ([7, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # round and round
        ([1, 2, 1], 0, []),
    ],
)
def test_prompt_lookup(ids, n, expected):
    drafted, q = PromptLookup(10).propose(ids, n, GREEDY, torch.Generator())
    assert drafted == expected and q.shape == (len(expected), 10)
    assert q.argmax(-1).tolist() == expected and (q.sum(-1) == 1).all()


def test_what_makes_no_sense_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="the draft has 50 ids, the model 61: a draft needs the same vocabulary"):
        Speculative(model, DraftModel(small_model(vocab_size=50)))
    with pytest.raises(ValueError, match="at least 1 drafted token a pass, found 0"):
        Speculative(model, PromptLookup(61), 0)
    speculative = Speculative(model, PromptLookup(61))
    with pytest.raises(ValueError, match="the prompt is 41 tokens long, the model takes 40"):
        speculative.stream([1] * 41, GREEDY)
    cache = model.make_cache(1)
    Feeder(model, cache)([[1, 2, 3]], [0])
    with pytest.raises(ValueError, match="the cache holds 3 ids, the prompt 3"):
        speculative.stream([1, 2, 3], GREEDY, cache=cache)


def test_a_draft_whose_embedding_has_more_rows_of_padding():
    model, draft = small_model(), small_model(vocab_size=70)
    model.n_ids = draft.n_ids = 50
    with torch.no_grad():
        model.lm_head.weight[50:] = 100 * model.lm_head.weight[:11]  # would often be the likeliest
    ids = list(Speculative(model, DraftModel(draft), 3).stream([1, 2, 3], GREEDY))
    assert ids == list(stream(model, [1, 2, 3], GREEDY)) and max(ids) < 50

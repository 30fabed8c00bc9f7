"""Decoding under every position encoding: against the full forward pass in float64, and, where frequencies depend on
the text's length, against a brute force that reads the text as it grows."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import llama_reference as reference
from helpers.small_model import random_tokens, sensitive_model
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_file
import rope
from attention.backends import attend
from attention.cache import KVCache
from model import Transformer

WINDOW = 6  # what the models were made for before they were stretched
ORIGINAL = {"original_max_position_embeddings": WINDOW}
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "ntk": {"rope_type": "ntk", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2, "beta_slow": 0.1} | ORIGINAL,
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 0.05, "high_freq_factor": 0.5} | ORIGINAL,
    "dynamic": {"rope_type": "dynamic", "factor": 2.0} | ORIGINAL,
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0]} | ORIGINAL,
    "clex": {"rope_type": "clex", "max_factor": 4} | ORIGINAL,
}
MODELS = {name: sensitive_model(max_seq_len=24, rope_scaling=scaling) for name, scaling in SCALINGS.items()}
GROWING = [name for name, model in MODELS.items() if not model.rope.cache_rotated]  # dynamic, longrope, clex


def decoding_error(model: Transformer, batch: int, cuts: list[int], cache: KVCache | None = None) -> float:
    """Largest difference between the full forward pass over a text and reading it in passes of `cuts` tokens, with
    frequencies for the whole text from the start."""
    T = sum(cuts)
    tokens, cache = random_tokens(batch, T), cache or model.make_cache(batch, T, text_len=T)
    parts = [model(part, cache=cache) for part in tokens.split(cuts, dim=1)]
    return (torch.cat(parts, dim=1) - model(tokens)).abs().max().item()


def growing_error(name: str, cuts: list[int], seed: int = 1) -> float:
    """Largest difference of logits from the brute force, of a text that is read in passes of `cuts` tokens."""
    model, tokens = MODELS[name], random_tokens(1, sum(cuts), seed=seed)
    cache = model.make_cache(1)
    parts = [model(part, cache=cache) for part in tokens.split(cuts, dim=1)]
    weights = dict(model.named_parameters())
    expected = reference.logits(model.args, weights, tokens[0].tolist(), cuts, model.rope.frequencies)
    return (torch.cat(parts, dim=1)[0] - expected).abs().max().item()


@pytest.fixture(autouse=True)
def exact_angles(monkeypatch):
    monkeypatch.setattr(rope, "cos_sin", reference.exact_cos_sin)


def test_every_encoding_is_decoded_here():
    assert SCALINGS.keys() == rope.FAMILIES.keys()


# ---- the same as the full forward pass


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", SCALINGS)
def test_prefill_then_decode_equals_full_forward(name, backend, monkeypatch):
    monkeypatch.setattr(model_file, "attend", partial(attend, backend=backend))
    for n in range(1, 16):
        for batch in (1, 3):
            assert decoding_error(MODELS[name], batch, [n] + [1] * (16 - n)) < 1e-12


@pytest.mark.parametrize("cuts", [[4, 5], [1, 1, 14], [5, 5, 5], [2, 11, 1, 1], [15, 1], [1] * 20])
@pytest.mark.parametrize("name", SCALINGS)
def test_chunked_prefill_equals_full_forward(name, cuts):
    assert decoding_error(MODELS[name], 2, cuts) < 1e-12


@pytest.mark.parametrize("name", SCALINGS)
def test_within_the_window_nothing_has_to_be_said_beforehand(name):
    model, tokens = MODELS[name], random_tokens(2, WINDOW)
    cache = model.make_cache(2)
    parts = [model(part, cache=cache) for part in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("kind", ["static", "sinks"])
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), steps=st.integers(1, 5), seed=st.integers(0, 9))
def test_ragged_rows_equal_each_row_alone(name, kind, lengths, steps, seed):
    """Each row with the frequencies of its own length, whatever its neighbours' are and the padding is."""
    model, longest = MODELS[name], max(lengths)
    rows = [random_tokens(n + steps, seed=seed + i) for i, n in enumerate(lengths)]
    prompts = torch.full((len(rows), longest), 13)
    for i, n in enumerate(lengths):
        prompts[i, :n] = rows[i][:n]
    cache, read = model.make_cache(len(rows), kind=kind), list(lengths)
    prefill = model.hidden(prompts, positions=torch.arange(longest).expand(prompts.shape), cache=cache, lengths=read)
    got = [[prefill[i, n - 1]] for i, n in enumerate(lengths)]
    for step in range(steps):
        tokens = torch.stack([row[n + step] for row, n in zip(rows, lengths)])[:, None]
        read = [n + 1 for n in read]
        positions = torch.tensor(read)[:, None] - 1
        for i, out in enumerate(model.hidden(tokens, positions=positions, cache=cache, lengths=read)):
            got[i].append(out[0])
    for row, n, out in zip(rows, lengths, got):
        alone = model.make_cache(1, kind=kind)
        parts = [model.hidden(part, cache=alone) for part in row[None].split([n] + [1] * steps, dim=1)]
        torch.testing.assert_close(torch.stack(out), torch.cat(parts, dim=1)[0, n - 1 :], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", GROWING)
def test_packed_documents_have_the_frequencies_of_their_own_length(name):
    model, tokens = MODELS[name], random_tokens(1, 24)
    sizes = [15, 2, 7]
    doc_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])[None]
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    together = model.hidden(tokens, positions=positions, doc_ids=doc_ids)
    alone = torch.cat([model.hidden(part) for part in tokens.split(sizes, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


# ---- a text that grows beyond the window


@pytest.mark.parametrize("cuts", [[9, 1, 1, 1], [1, 4, 1, 8, 1], [5, 13, 1]])
@pytest.mark.parametrize("name", GROWING)
def test_a_growing_text_equals_the_brute_force(name, cuts):
    assert growing_error(name, cuts) < 1e-11


@pytest.mark.parametrize("name", GROWING)
def test_a_growing_text_is_not_the_full_forward_pass(name):
    """Earlier tokens' deeper states are of their time: what the module says, and no more."""
    model, tokens = MODELS[name], random_tokens(1, 16)
    cache = model.make_cache(1)
    parts = [model(part, cache=cache) for part in tokens.split(1, dim=1)]
    assert (parts[-1][0, -1] - model(tokens)[0, -1]).abs().max() > 1e-3
    shallow = Transformer(model.args.replace(n_layers=1)).double().eval()  # which has no deeper states
    shallow.load_state_dict(model.state_dict(), strict=False)
    cache = shallow.make_cache(1)
    parts = [shallow(part, cache=cache) for part in tokens.split(1, dim=1)]
    torch.testing.assert_close(parts[-1][0, -1], shallow(tokens)[0, -1], atol=1e-12, rtol=0)


def test_a_text_longer_than_said_is_refused():
    with pytest.raises(ValueError, match="text_len should be at least the cache's max_len 24, found 20"):
        MODELS["dynamic"].make_cache(1, 24, text_len=20)
    cache = MODELS["clex"].make_cache(1, 40)
    with pytest.raises(ValueError, match=r"texts of 24 tokens .* found a text of 30"):
        MODELS["clex"](random_tokens(1, 30), cache=cache)


# ---- broken forms, each of which these comparisons see


class RotatedTwice(KVCache):
    """Gives rotated keys to an attention that rotates all keys it gets, as caches of raw keys need."""

    def update(self, layer, k, v):
        keys, values = super().update(layer, k, v)
        angles = reference.exact_cos_sin(torch.arange(keys.shape[2]), *MODELS["default"].rope.frequencies(0))
        return rope.rotate(keys, *angles), values


def test_keys_rotated_twice_are_seen():
    a = MODELS["default"].args
    broken, right = (
        kind(a.n_layers, 2, a.n_kv_heads, a.head_dim, 24, torch.float64) for kind in (RotatedTwice, KVCache)
    )
    assert decoding_error(MODELS["default"], 2, [5, 1, 1], right) < 1e-12
    assert decoding_error(MODELS["default"], 2, [5, 1, 1], broken) > 0.1


@pytest.mark.parametrize("cuts", [[5, 1], [5, 4]])
def test_causal_from_the_first_key_is_seen(cuts, monkeypatch):
    def broken(q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    model, tokens = MODELS["default"], random_tokens(1, sum(cuts))
    full = model(tokens)
    monkeypatch.setattr(model_file, "attend", broken)
    torch.testing.assert_close(model(tokens), full, atol=1e-12, rtol=0)  # T == S: nothing to see
    cache = model.make_cache(1)
    parts = [model(part, cache=cache) for part in tokens.split(cuts, dim=1)]
    assert (torch.cat(parts, dim=1) - full)[:, cuts[0] :].abs().max() > 0.1


def test_keys_that_keep_the_frequencies_of_their_time_are_seen(monkeypatch):
    """What transformers does: keys are cached as rotated when the text was shorter."""
    model, cuts = MODELS["dynamic"], [9, 1, 1, 1, 1, 1]
    tokens = random_tokens(1, sum(cuts))
    expected = reference.logits(
        model.args, dict(model.named_parameters()), tokens[0].tolist(), cuts, model.rope.frequencies
    )
    right, parts, cache = model.rope, [], model.make_cache(1)
    cache.rotated = True
    for part in tokens.split(cuts, dim=1):
        monkeypatch.setattr(model, "rope", rope.fixed(*right.frequencies(cache.length + part.shape[1])))
        parts.append(model(part, cache=cache))
    assert (torch.cat(parts, dim=1)[0] - expected).abs().max() > 1e-3

"""Caches that keep less: sinks and recent tokens (StreamingLLM), and numbers in 8 bits."""

import pytest
import torch
from helpers import llama_reference as reference
from helpers.small_model import random_tokens, sensitive_model
from hypothesis import given, settings
from hypothesis import strategies as st

import rope
from attention.cache import KINDS, Int8Cache, SinkCache
from model import Transformer

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 5}
MODELS = {
    "plain": sensitive_model(),
    "dynamic": sensitive_model(rope_scaling=DYNAMIC),
    "qwen3": sensitive_model(qk_norm=True),
}
SHALLOW = sensitive_model(n_layers=1)


def kept(n: int, size: int, sinks: int) -> list[int]:
    """Which of n tokens are still in a cache of `size` places."""
    return list(range(n)) if n <= size else [*range(sinks), *range(n - size + sinks, n)]


def shallow_sink_error(size: int, sinks: int, length: int) -> float:
    """One layer: every step of a stream against a forward pass over the kept tokens, as a text of their own."""
    tokens, cache = random_tokens(1, length), SHALLOW.make_cache(1, size, "sinks", sinks=sinks)
    worst = 0.0
    for n in range(1, length + 1):
        got = SHALLOW(tokens[:, n - 1 : n], cache=cache)[0, -1]
        expected = SHALLOW(tokens[:, kept(n, size, sinks)])[0, -1]
        worst = max(worst, (got - expected).abs().max().item())
    return worst


def sink_error(model: Transformer, size: int, sinks: int, cuts: list[int]) -> float:
    """Several layers: a stream read in passes of `cuts` tokens against the brute force."""
    tokens, cache = random_tokens(1, sum(cuts)), model.make_cache(1, size, "sinks", sinks=sinks)
    parts, passes = [], []
    for part in tokens.split(cuts, dim=1):
        passes += cache.passes(part.shape[1])
        parts.append(model(part, cache=cache))
    expected = reference.logits(
        *(model.args, dict(model.named_parameters()), tokens[0].tolist(), passes, model.rope.frequencies),
        keep=lambda n: kept(n, size, sinks),
    )
    return (torch.cat(parts, dim=1)[0] - expected).abs().max().item()


def int8_error(x: torch.Tensor) -> float:
    """Largest rounding error, as a share of the largest number of its head's vector; x (B, K, T, D)."""
    cache = Int8Cache(1, x.shape[0], x.shape[1], x.shape[3], x.shape[2], torch.float64)
    cache.extend(None, x.shape[2])
    keys, values = cache.update(0, x, -x)
    assert torch.equal(keys, -values)
    return ((keys - x).abs() / x.abs().amax(-1, keepdim=True)).max().item()


@pytest.fixture(autouse=True)
def exact_angles(monkeypatch):
    monkeypatch.setattr(rope, "cos_sin", reference.exact_cos_sin)


# ---- sinks and recent tokens


@pytest.mark.parametrize("size, sinks", [(7, 2), (5, 0), (6, 5), (1, 0), (12, 4)])
def test_a_stream_through_one_layer_is_attention_over_what_is_kept(size, sinks):
    assert shallow_sink_error(size, sinks, 3 * size + 5) < 1e-12


@pytest.mark.parametrize(
    "size, sinks, cuts",
    [
        (7, 2, [1] * 18),
        (7, 2, [7, 1, 1, 1, 5, 2]),
        (8, 3, [3, 4, 4, 1, 1]),
        (6, 0, [4, 3, 6, 1]),
        (5, 4, [5, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_stream_through_several_layers_equals_the_brute_force(name, size, sinks, cuts):
    assert sink_error(MODELS[name], size, sinks, cuts) < 1e-11


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_lost_while_there_is_room(name):
    model, tokens = MODELS[name], random_tokens(2, 12)
    cache, static = model.make_cache(2, kind="sinks"), model.make_cache(2)
    for part in tokens.split([5, 1, 4, 2], dim=1):
        torch.testing.assert_close(model(part, cache=cache), model(part, cache=static), atol=1e-12, rtol=0)


def test_a_long_text_is_cut_so_that_recent_tokens_stay():
    model, tokens = MODELS["plain"], random_tokens(2, 40)
    cache = model.make_cache(2, kind="sinks", sinks=4)
    assert cache.passes(40) == [12, 4, 4, 4, 4, 4, 4, 4]
    whole = model(tokens, cache=cache)
    assert whole.shape == (2, 40, 17)
    assert cache.length == 40
    assert cache.passes(9) == [4, 4, 1]
    assert cache.passes(1) == [1]
    again = model.make_cache(2, kind="sinks", sinks=4)
    parts = [model(part, cache=again) for part in tokens.split([12, 4, 4, 4, 4, 4, 4, 4], dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), steps=st.integers(0, 6), sinks=st.integers(0, 4))
def test_ragged_streams_equal_each_alone(lengths, steps, sinks):
    model, longest = MODELS["dynamic"], max(lengths)
    rows = [random_tokens(n + steps, seed=i) for i, n in enumerate(lengths)]
    prompts = torch.full((len(rows), longest), 13)
    for i, n in enumerate(lengths):
        prompts[i, :n] = rows[i][:n]
    cache, read = model.make_cache(len(rows), kind="sinks", sinks=sinks), list(lengths)
    prefill = model.hidden(prompts, positions=torch.arange(longest).expand(prompts.shape), cache=cache, lengths=read)
    got = [[prefill[i, n - 1]] for i, n in enumerate(lengths)]
    for step in range(steps):
        tokens = torch.stack([row[n + step] for row, n in zip(rows, lengths)])[:, None]
        read = [n + 1 for n in read]
        out = model.hidden(tokens, positions=torch.tensor(read)[:, None] - 1, cache=cache, lengths=read)
        for i, hidden in enumerate(out):
            got[i].append(hidden[0])
    for row, n, out in zip(rows, lengths, got):
        alone = model.make_cache(1, kind="sinks", sinks=sinks)
        parts = [model.hidden(part, cache=alone) for part in row[None].split([n] + [1] * steps, dim=1)]
        torch.testing.assert_close(torch.stack(out), torch.cat(parts, dim=1)[0, n - 1 :], atol=1e-12, rtol=0)


def test_truncating_a_stream():
    """What is still there is exact; what would need tokens that have gone begins anew."""
    model, tokens = MODELS["plain"], random_tokens(1, 20)
    cache = model.make_cache(1, 8, "sinks", sinks=2)
    model(tokens[:, :8], cache=cache)
    cache.truncate(3)
    assert cache.length == 3
    got = model(tokens[:, 10:14], cache=cache)
    expected = model(torch.cat((tokens[:, :3], tokens[:, 10:14]), dim=1))[:, 3:]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    model(tokens, cache=cache)
    assert cache.length == 27
    cache.truncate(30)
    assert cache.length == 27
    cache.truncate(26)
    assert cache.length == 0
    torch.testing.assert_close(model(tokens[:, :6], cache=cache), model(tokens[:, :6]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["sinks", "int8"])
def test_reorder_repeats_and_drops_rows(kind):
    model, tokens = MODELS["plain"], random_tokens(3, 10)
    cache, rows = model.make_cache(3, kind=kind), torch.tensor([2, 0, 2, 1])
    model(tokens, cache=cache)
    cache.reorder(rows)
    fresh = model.make_cache(4, kind=kind)
    model(tokens[rows], cache=fresh)
    following = random_tokens(4, 1, seed=3)
    expected = model(following, cache=fresh)
    torch.testing.assert_close(model(following, cache=cache), expected, atol=1e-12, rtol=0)


def test_memory_does_not_grow():
    cache = MODELS["plain"].make_cache(2, 9, "sinks")
    assert cache.keys.shape == (2, 2, 2, 10, 6)  # and one slot for padding
    MODELS["plain"](random_tokens(2, 50), cache=cache)
    assert cache.keys.shape == (2, 2, 2, 10, 6)


@pytest.mark.parametrize("size, sinks", [(4, 4), (3, 4), (5, -1)])
def test_a_cache_without_recent_tokens_is_refused(size, sinks):
    with pytest.raises(ValueError, match=f"sinks should lie in .* in a cache of {size}, found {sinks}"):
        MODELS["plain"].make_cache(1, size, "sinks", sinks=sinks)


def test_what_sinks_cannot_do_is_refused():
    with pytest.raises(ValueError, match="a cache with sinks goes with no sliding_window, found 4"):
        sensitive_model(sliding_window=4).make_cache(1, kind="sinks")
    cache = SinkCache(1, 1, 1, 2, 6, sinks=2)
    with pytest.raises(ValueError, match="a pass should have at most 4 tokens in a full cache, found 5"):
        cache.extend(torch.arange(3, 8)[None])
    with pytest.raises(ValueError, match="cache should be one of static, int8, sinks, found 'paged'"):
        MODELS["plain"].make_cache(1, kind="paged")


def test_what_callers_may_ask_of_a_kind():
    """Only a cache that keeps every token can go back to any of them."""
    made = {kind: MODELS["plain"].make_cache(1, 9, kind) for kind in KINDS}
    assert {kind: (c.can_rewind, c.endless) for kind, c in made.items()} == {
        "static": (True, False),
        "int8": (True, False),
        "sinks": (False, True),
    }


# ---- 8 bits


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_rounding_stays_within_the_bound(shape, scale, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() * scale
    x[..., 0] *= 30  # one large number a head, as keys have them
    assert int8_error(x) <= 1 / 254 + 1e-6  # the scale itself is float32


def test_zeros_stay_zeros():
    cache = Int8Cache(1, 1, 1, 4, 3)
    cache.extend(None, 3)
    keys, _ = cache.update(0, torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
    assert torch.equal(keys, torch.zeros(1, 1, 3, 4))
    assert (cache.keys.dtype, cache.key_scale.shape) == (torch.int8, (1, 1, 1, 3, 1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cuts", [[12], [5, 1, 4, 2], [1] * 12])
def test_eight_bits_do_not_depend_on_how_a_text_is_cut(name, cuts):
    model, tokens = MODELS[name], random_tokens(2, 12)
    cache, whole = (model.make_cache(2, kind="int8", text_len=12) for _ in range(2))
    parts = [model(part, cache=cache) for part in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens, cache=whole), atol=1e-10, rtol=0)
    drift = (torch.cat(parts, dim=1) - model(tokens)).norm() / model(tokens).norm()
    assert 0 < drift < 0.05  # these weights are far livelier than a trained model's

"""Decoding with a cache against the full forward pass, in float64: 1e-12 turns "close" into "the same formula"."""

import itertools

import pytest
import torch
from helpers.small_model import random_tokens, sensitive_model
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import CACHES
from attention.backends import Mask
from attention.cache import KVCache, keep_prefix
from model import Transformer

EXACT = {"atol": 1e-12, "rtol": 0}


MODELS = {
    "gqa": sensitive_model(),
    "mha": sensitive_model(n_kv_heads=4),
    "mqa untied": sensitive_model(n_kv_heads=1, tie_embeddings=False),
    "window": sensitive_model(sliding_window=3),
    "qwen3": sensitive_model(qk_norm=True, head_dim=10),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request) -> Transformer:
    return MODELS[request.param]


@pytest.mark.parametrize("n", range(1, 9))
def test_prefill_then_decode_equals_full_forward(model, n):
    tokens = random_tokens(3, 9)
    full, cache = model(tokens), model.make_cache(3)
    torch.testing.assert_close(model(tokens[:, :n], cache=cache), full[:, :n], **EXACT)
    for t in range(n, 9):
        torch.testing.assert_close(model(tokens[:, t : t + 1], cache=cache), full[:, t : t + 1], **EXACT)
    assert cache.length == 9


@pytest.mark.parametrize("cuts", [(4, 5), (1, 1, 7), (3, 3, 3), (2, 5, 1, 1), (8, 1)])
def test_chunked_prefill_equals_full_forward(model, cuts):
    tokens = random_tokens(2, sum(cuts))
    cache = model.make_cache(2)
    parts = [model(part, cache=cache) for part in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), **EXACT)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), steps=st.integers(1, 4), seed=st.integers(0, 9))
def test_ragged_rows_padded_on_the_right_equal_each_row_alone(model, lengths, steps, seed):
    longest = max(lengths)
    rows = [random_tokens(n + steps, seed=seed + i) for i, n in enumerate(lengths)]
    prompts = torch.full((len(rows), longest), 13)  # what lies beyond a row's own length is garbage
    for i, n in enumerate(lengths):
        prompts[i, :n] = rows[i][:n]
    cache = model.make_cache(len(rows), longest + steps)
    prefill = model(prompts, positions=torch.arange(longest).expand(len(rows), longest), cache=cache)
    got = [[prefill[i, n - 1]] for i, n in enumerate(lengths)]
    for step in range(steps):
        tokens = torch.stack([row[n + step] for row, n in zip(rows, lengths)])[:, None]
        positions = torch.tensor(lengths)[:, None] + step
        for i, out in enumerate(model(tokens, positions=positions, cache=cache)):
            got[i].append(out[0])
    for row, n, out in zip(rows, lengths, got):
        torch.testing.assert_close(torch.stack(out), model(row[None])[0, n - 1 :], **EXACT)


def test_chunks_at_different_positions_in_each_row(model):
    tokens = random_tokens(2, 8)
    cache = model.make_cache(2)
    model(tokens[:, :5], cache=cache)
    # row 0 goes on from 5, row 1 rewrites from 3
    chunk = torch.stack([tokens[0, 5:8], tokens[1, 3:6]])
    out = model(chunk, positions=torch.tensor([[5, 6, 7], [3, 4, 5]]), cache=cache)
    full = model(tokens)
    torch.testing.assert_close(out, torch.stack([full[0, 5:8], full[1, 3:6]]), **EXACT)


def test_truncate_and_redo(model):
    first, second = random_tokens(2, 8), random_tokens(2, 8, seed=2)
    cache = model.make_cache(2)
    model(first, cache=cache)
    cache.truncate(3)
    assert cache.length == 3
    out = model(second[:, 3:6], cache=cache)
    expected = model(torch.cat((first[:, :3], second[:, 3:6]), dim=1))[:, 3:]
    torch.testing.assert_close(out, expected, **EXACT)
    cache.truncate(100)  # nothing to forget
    assert cache.length == 6


@pytest.mark.parametrize(
    "held, wanted, kept",
    [("abcdXX", "abcde", 4), ("abXdXX", "abcde", 2), ("abcd", "abcd", 3), ("abcd", "ab", 1), ("xbcd", "abcd", 0)],
)
def test_what_another_text_begins_with_stays(model, held, wanted, kept):
    cache = model.make_cache(1)
    cache.length = 4
    keep_prefix(cache, [ord(c) for c in wanted], [ord(c) for c in held])
    assert cache.length == kept


def test_reorder_repeats_and_drops_rows(model):
    tokens = random_tokens(3, 6)
    cache = model.make_cache(3)
    model(tokens[:, :5], cache=cache)
    rows = torch.tensor([2, 0, 2, 1])
    cache.reorder(rows)
    following = random_tokens(4, 1, seed=3)
    expected = model(torch.cat((tokens[rows, :5], following), dim=1))[:, -1:]
    torch.testing.assert_close(model(following, cache=cache), expected, **EXACT)


def test_writing_past_the_end_is_refused_and_changes_nothing(model):
    tokens = random_tokens(1, 13)
    cache = model.make_cache(1)
    model(tokens[:, :12], cache=cache)
    with pytest.raises(ValueError, match=r"holds positions 0\.\.11, found tokens at 12\.\.12"):
        model(tokens[:, 12:], cache=cache)
    assert cache.length == 12
    with pytest.raises(ValueError, match=r"found tokens at -1\.\.0"):
        model(tokens[:, :2], positions=torch.tensor([[-1, 0]]), cache=cache)


def test_mask_by_its_definition():
    for window, positions in itertools.product((None, 2), ([[0, 1, 2]], [[3, 4], [1, 2]], [[2], [5]], [[4]])):
        cache = KVCache(1, len(positions), 1, 2, max_len=8, window=window)
        cache.extend(torch.arange(3)[None].expand(len(positions), 3))
        mask = cache.extend(torch.tensor(positions)).mask
        S = max(3, max(map(max, positions)) + 1)
        assert cache.length == S
        if mask is None:  # the queries are the last of what is there: attention knows that, and the window, by itself
            mask = (
                Mask(window=window)
                .boolean(len(positions[0]), S, torch.device("cpu"))
                .expand(len(positions), -1, -1, -1)
            )
        for b, row in enumerate(positions):
            for t, p in enumerate(row):
                for slot in range(S):
                    visible = slot <= p and (window is None or p - slot < window)
                    assert mask[b, 0, t, slot].item() == visible


def test_size_and_dtype_follow_the_model(model):
    a = model.args
    cache = model.make_cache(5)
    assert cache.keys.shape == cache.values.shape == (a.n_layers, 5, a.n_kv_heads, 12, a.head_dim)
    assert cache.keys.dtype == torch.float64
    assert model.make_cache(1, 40).max_len == 40
    model.compute_dtype = torch.bfloat16
    try:
        assert model.make_cache(1).values.dtype == torch.bfloat16
    finally:
        model.compute_dtype = None


@pytest.mark.parametrize("kind", CACHES)
def test_slots_are_added_as_texts_grow(model, kind, monkeypatch):
    """As if all of them had been there from the start, whatever the kind, when rows join and leave, too."""
    if kind == "sinks" and model.args.sliding_window:
        pytest.skip("sinks do not go with a window")
    tokens, found = random_tokens(3, 12), []
    for block in (256, 2):
        monkeypatch.setattr("attention.cache.BLOCK", block)
        cache, other = model.make_cache(1, kind=kind), model.make_cache(2, kind=kind)
        parts = [model(tokens[:1, :5], cache=cache), model(tokens[1:, :3], cache=other)]
        with torch.inference_mode():
            parts.append(model(tokens[1:, 3:5], cache=other))
        cache.append(other)
        parts.append(model(tokens[:, 5:10], cache=cache))
        cache.reorder(torch.tensor([2, 0]))
        parts.append(model(tokens[[2, 0], 10:], cache=cache))
        found.append(parts)
    for wide, grown in zip(*found):
        torch.testing.assert_close(grown, wide, **EXACT)
    if kind == "static":
        torch.testing.assert_close(found[1][-1], model(tokens)[[2, 0], 10:], **EXACT)


@pytest.mark.parametrize("kind", CACHES)
def test_a_few_words_in_a_long_context_take_little_memory(kind):
    model = sensitive_model(max_seq_len=10**9)
    cache = model.make_cache(2, kind=kind)
    tokens = random_tokens(2, 4)
    torch.testing.assert_close(model(tokens, cache=cache)[:, -1], model(tokens)[:, -1], atol=0.02, rtol=0.05)
    assert sum(getattr(cache, name).nbytes for name in cache.stored) < 2**20
    # 3000 tokens: at most half as many slots again, and whole blocks
    cache.reserve(3000)
    assert 3000 <= cache.room <= 4500 + 256

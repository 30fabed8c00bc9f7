"""A server's rows: whatever comes and goes, a text has the ids and log-probabilities that it has alone."""

import dataclasses
import math
import random

import pytest
import torch
from helpers.small_model import random_prompts, small_model, uncached
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.fixed_rows import FixedRows
from decoding.generate import generate_scored
from decoding.params import SamplingParams, Stop

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
SETTINGS = [
    GREEDY,
    SamplingParams(temperature=1.5, top_k=20, top_p=0.98, repetition_penalty=1.2, max_new_tokens=9, seed=7),
    SamplingParams(temperature=1, top_k=0, min_p=0.01, max_new_tokens=15, seed=3),
]


def uncompiled(monkeypatch):
    monkeypatch.setattr("decoding.cpu_step.stepper", lambda *_: None)


def collect(rows: FixedRows, told: dict, steps: int = -1) -> None:
    """Make so many steps, or all, and note the tokens of each text and why it ended."""
    while rows and steps:
        for key, tokens, ended in rows.step():
            told.setdefault(key, []).extend(tokens)
            if ended:
                told[key, "ended"] = ended
        steps -= 1


def ids(tokens) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1}, {"sliding_window": 5}], ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_texts_that_come_and_go_have_their_own_ids(monkeypatch, shape, compiled):
    if not compiled:
        uncompiled(monkeypatch)
    model, told, expected = small_model(**shape), {}, {}
    rows, waiting = FixedRows(model, 3, most=17), random_prompts([7, 30, 1, 18, 40, 3, 22])
    waiting.append([*waiting[1][:20], 3, 4])
    while waiting or rows:
        if waiting and rows.free:
            prompt = waiting.pop(0)
            key, _ = rows.add(prompt, GREEDY)
            expected[key] = uncached(model, prompt, 12)[: 41 - len(prompt)]
        collect(rows, told, steps=2)
    assert {key: ids(told[key]) for key in expected} == expected
    assert all(told[key, "ended"] == "length" for key in expected) and rows.free == 3 and rows.step() == []


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_load_kept_beginnings_and_portions_change_no_bit(seed):
    rng, model = random.Random(seed), small_model().float()
    beginning, told, asked, live = random_prompts([20], seed=seed)[0], {}, {}, set()
    rows = FixedRows(model, rng.randint(1, 4), most=rng.choice([1, 20, 128]))
    if rows.compiled is None:
        pytest.skip("there is no C++ compiler that works")
    for n in range(12):
        while rows.free and rng.random() < 0.6:
            prompt = beginning[: rng.randint(0, 20)] + random_prompts([rng.randint(1, 19)], seed=seed + n)[0]
            params = dataclasses.replace(rng.choice(SETTINGS), seed=rng.randint(0, 9))
            options = {"stop": Stop([1, 2, 3]), "top": rng.choice([None, 0, 3]), "echo": rng.random() < 0.3}
            asked[rows.add(prompt, params, **options)[0]] = prompt, params, options
        if asked and rng.random() < 0.3:
            rows.remove(rng.choice(list(asked)))
        collect(rows, told, steps=rng.randint(0, 3))
        live = {key for key in asked if key in rows._texts}
    collect(rows, told)
    for key, (prompt, params, options) in asked.items():
        alone: dict = {}
        one = FixedRows(model, 1, most=1000)
        one.add(prompt, params, **options)
        collect(one, alone)
        found = told.get(key, [])
        whole = key in live or (key, "ended") in told
        assert repr(found) == repr(alone[1] if whole else alone[1][: len(found)])  # repr: nan is nan
        assert told.get((key, "ended")) == (alone[1, "ended"] if whole else None)


@pytest.mark.parametrize("compiled", [True, False])
def test_what_was_read_before_is_not_read_again(monkeypatch, compiled):
    if not compiled:
        uncompiled(monkeypatch)
    model, told = small_model(), {}
    rows, (prompt,) = FixedRows(model, 2, most=16), random_prompts([30])
    first, kept = rows.add(prompt, GREEDY)
    assert kept == 0
    collect(rows, told, steps=1)
    second, kept = rows.add(prompt, GREEDY)  # from a text that is still being read
    assert kept == 16 and not rows.free
    with pytest.raises(RuntimeError, match="every row"):
        rows.add(prompt, GREEDY)
    collect(rows, told)
    turn = prompt + ids(told[first])[:5]
    third, kept = rows.add([*turn, 9], GREEDY)  # prompt and answer of the turn before
    assert kept == 35
    fourth, kept = rows.add([*turn, 9], GREEDY, echo=True)
    assert kept == 0  # what is told about a prompt has to be computed
    collect(rows, told)
    expected = [uncached(model, prompt, 11), uncached(model, [*turn, 9], 5)]
    assert [ids(told[key]) for key in (first, second, third)] == [expected[0], expected[0], expected[1]]
    assert ids(told[fourth]) == turn + [9] + expected[1]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("n", [1, 2, 31])
def test_echoed_tokens_have_the_log_probabilities_of_a_forward_pass(monkeypatch, compiled, n):
    if not compiled:
        uncompiled(monkeypatch)
    model, told = small_model(), {}
    rows, (prompt, other) = FixedRows(model, 2, most=20), random_prompts([n, 25])
    rows.add(other, GREEDY)
    collect(rows, told, steps=1)
    key, _ = rows.add(prompt, dataclasses.replace(GREEDY, max_new_tokens=1), top=61, echo=True)
    collect(rows, told)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).log_softmax(-1)[0]  # (n, V)
    first, *rest = told[key]
    assert ids(told[key]) == [*prompt, int(logprobs[-1].argmax())]
    assert math.isnan(first.logprob) and first.top == ()
    for token, row in zip(rest, logprobs):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-5)  # float32
        assert dict(token.top) == pytest.approx(dict(enumerate(row.tolist())), abs=1e-5)


def test_settings_endings_and_scores_are_those_of_other_callers():
    model, prompts, told = small_model(), random_prompts([4, 4, 8, 2]), {}
    stops = [Stop(), Stop(ended=lambda ids: len(ids) == 2), Stop([5]), Stop(range(61))]
    rows = FixedRows(model, 4)
    keys = [rows.add(p, SETTINGS[i % 3], stops[i], top=3)[0] for i, p in enumerate(prompts)]
    collect(rows, told)
    for i, (key, prompt) in enumerate(zip(keys, prompts)):
        (alone,) = generate_scored(model, [prompt], SETTINGS[i % 3], stops[i], [SETTINGS[i % 3].seed], top=3)
        tokens = told[key]
        if tokens[-1].id in stops[i].ids:
            assert told[key, "ended"] == "stop"
            tokens = tokens[:-1]
        assert tokens == alone or ids(tokens) == ids(alone)
    assert [told[key, "ended"] for key in keys[1:2] + keys[3:]] == ["stop", "stop"] and len(told[keys[3]]) == 1


def test_logits_may_be_changed_before_the_draw_and_are_told_as_they_were():
    model, (prompt,), told = small_model(), random_prompts([6]), {}
    free = uncached(model, prompt, 1)[0]

    def adjust(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        assert logits.shape == (61,) and len(answer) < 3
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([7 + len(answer)]), 0.0)

    rows = FixedRows(model, 2)
    key, _ = rows.add(prompt, dataclasses.replace(GREEDY, max_new_tokens=3), top=1, adjust=adjust)
    other, _ = rows.add(prompt, dataclasses.replace(GREEDY, max_new_tokens=3), top=1)
    collect(rows, told)
    assert ids(told[key]) == [7, 8, 9] and ids(told[other]) == uncached(model, prompt, 3)
    assert told[key][0].top == told[other][0].top and told[key][0].top[0][0] == free


def test_a_prompt_that_does_not_fit_is_refused_and_takes_no_row():
    rows = FixedRows(small_model(), 1)
    for prompt, sentence in (([], "is empty"), ([1] * 41, "41 tokens long"), ([61], "id 61")):
        with pytest.raises(ValueError, match=sentence):
            rows.add(prompt, GREEDY)
    assert rows.free == 1 and rows.bytes() == 2 * 2 * 2 * 40 * 8 * 8  # k and v, layers, heads, slots, D, bytes

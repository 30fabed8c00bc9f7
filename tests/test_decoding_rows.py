"""Rows that come and go while others are decoded: each has the ids that it has alone."""

import dataclasses
import random

import pytest
from helpers.small_model import random_prompts, small_model, uncached
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.feeder import Feeder
from decoding.generate import generate, generate_scored, stream
from decoding.params import SamplingParams, Stop
from decoding.rows import Rows

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
SETTINGS = [
    GREEDY,
    SamplingParams(temperature=1.5, top_k=20, top_p=0.98, repetition_penalty=1.2, max_new_tokens=9, seed=7),
    SamplingParams(temperature=1, top_k=0, min_p=0.01, max_new_tokens=15, seed=3),
]


def collect(rows: Rows, answers: dict[int, list[int]], steps: int | None = None) -> None:
    """Make so many steps, or all, and note the ids of each row."""
    while rows and steps != 0:
        for row, token in rows.step():
            answers.setdefault(row, []).append(token.id)
        steps = None if steps is None else steps - 1


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1}, {"sliding_window": 5}], ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_row_that_comes_while_others_decode_has_its_own_ids(monkeypatch, shape, compiled):
    if not compiled:
        monkeypatch.setattr("decoding.cpu_step.stepper", lambda *_: None)
    model = small_model(**shape)
    prompts, answers = random_prompts([7, 30, 1, 18]), {}
    rows = Rows(model)
    first = [rows.add(prompt, GREEDY) for prompt in prompts[:2]]
    collect(rows, answers, steps=3)
    later = rows.add(prompts[2], GREEDY)
    collect(rows, answers, steps=2)
    last = rows.add(prompts[3], GREEDY)
    assert len(rows) == 4 and last in rows and len(answers[later]) == 2
    collect(rows, answers)
    assert [answers[row] for row in (*first, later, last)] == [uncached(model, p, 12)[: 41 - len(p)] for p in prompts]
    assert len(rows) == 0 and last not in rows and rows.step() == []
    again = rows.add(prompts[0], GREEDY)  # into a batch from which all have gone
    collect(rows, answers)
    assert answers[again] == answers[first[0]]


def test_rows_that_come_and_go_in_a_cache_that_grows(monkeypatch):
    monkeypatch.setattr("attention.cache.BLOCK", 2)
    model, prompts, answers = small_model(), random_prompts([3, 25, 1]), {}
    rows = Rows(model)
    keys = []
    for prompt in prompts:
        keys.append(rows.add(prompt, GREEDY))
        collect(rows, answers, steps=4)
    collect(rows, answers)
    assert [answers[key] for key in keys] == [uncached(model, prompt, 12) for prompt in prompts]


@given(st.integers(0, 10_000), st.sampled_from(["static", "int8", "sinks"]))
@settings(max_examples=15, deadline=None)
def test_whatever_comes_and_goes_each_row_is_as_it_is_alone(seed, kind):
    rng, model = random.Random(seed), small_model()
    rows, answers, asked = Rows(model, cache=kind), {}, {}
    for n in range(10):
        for prompt in random_prompts([rng.randint(1, 38) for _ in range(rng.randint(0, 2))], seed=seed + n):
            params = dataclasses.replace(rng.choice(SETTINGS), seed=rng.randint(0, 9))
            asked[rows.add(prompt, params, Stop([1, 2, 3]))] = prompt, params
        if asked and rng.random() < 0.3:
            rows.remove(rng.choice(list(asked)))  # one that decodes, waits, or has ended
        collect(rows, answers, steps=rng.randint(0, 3))
    live = [row for row in asked if row in rows]
    collect(rows, answers)
    for row, (prompt, params) in asked.items():
        alone = list(stream(model, prompt, params, Stop([1, 2, 3]), kind))
        answer = answers.get(row, [])
        assert answer == (alone if row in live else alone[: len(answer)])


def test_a_row_that_is_removed_leaves_the_others_alone():
    model, prompts, answers = small_model(), random_prompts([5, 9, 3]), {}
    rows = Rows(model)
    keys = [rows.add(prompt, GREEDY) for prompt in prompts]
    collect(rows, answers, steps=4)
    waiting = rows.add(prompts[0], GREEDY)
    for key in (keys[1], waiting, keys[1]):
        rows.remove(key)
        assert key not in rows
    collect(rows, answers)
    expected = [uncached(model, prompt, 12) for prompt in prompts]
    assert [answers[key] for key in keys] == [expected[0], expected[1][:4], expected[2]]
    assert waiting not in answers


def test_each_row_has_its_own_settings_endings_and_scores():
    model, prompts = small_model(), random_prompts([4, 4, 8, 2])
    rows, tokens = Rows(model), {}
    stops = [Stop(), Stop(ended=lambda ids: len(ids) == 2), Stop([5]), Stop()]
    tops = [None, 3, None, 0]
    for i, prompt in enumerate(prompts):
        rows.add(prompt, SETTINGS[i % 3], stops[i], tops[i])
    while rows:
        for row, token in rows.step():
            tokens.setdefault(row, []).append(token)
    for i, prompt in enumerate(prompts):
        alone = generate_scored(model, [prompt], SETTINGS[i % 3], stops[i], top=tops[i] or 0)
        ids, scored = [[t.id for t in answer] for answer in (tokens[i], alone[0])]
        assert ids == scored
        if tops[i] is None:
            assert all(token.logprob != token.logprob and token.top == () for token in tokens[i])  # nan
        else:
            assert [t.logprob for t in tokens[i]] == pytest.approx([t.logprob for t in alone[0]])
            assert [len(t.top) for t in tokens[i]] == [tops[i]] * len(ids)
    assert len(tokens[1]) == 2


def test_a_prompt_that_cannot_be_continued_does_not_disturb_the_rows():
    model, answers = small_model(), {}
    rows = Rows(model)
    row = rows.add([4], GREEDY)
    collect(rows, answers, steps=2)
    for prompt, sentence in (([], "is empty"), ([1] * 41, "41 tokens long"), ([61], "id 61")):
        with pytest.raises(ValueError, match=sentence):
            rows.add(prompt, GREEDY)
    collect(rows, answers)
    assert answers == {row: uncached(model, [4], 12)}
    with pytest.raises(ValueError, match="cache should be one of static, int8, sinks, found 'none'"):
        Rows(model, cache="none")


def test_an_interrupted_step_can_be_made_again(monkeypatch):
    monkeypatch.setattr("decoding.cpu_step.stepper", lambda *_: None)  # a compiled step is not interrupted halfway
    model, prompts, answers = small_model(), random_prompts([5, 9, 3]), {}
    rows = Rows(model)
    keys = [rows.add(prompt, GREEDY) for prompt in prompts[:2]]
    collect(rows, answers, steps=3)
    keys.append(rows.add(prompts[2], GREEDY))
    calls, feed = [], Feeder.__call__

    def interrupted(self, *args):
        calls.append(self)
        if len(calls) == 2:  # the running rows have been fed, the new one has not
            raise KeyboardInterrupt
        return feed(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Feeder, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rows.step()
    collect(rows, answers)
    assert [answers[key] for key in keys] == generate(model, prompts, GREEDY)

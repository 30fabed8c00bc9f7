"""The decoding loop against transformers' `generate` and against uncached float64."""

import dataclasses
import json

import pytest
import torch
from helpers.small_model import chi_square, random_prompts, small_model, uncached
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.directory import load_model
from cli import progress
from decoding.feeder import Feeder, check_prompts
from decoding.generate import Sampled, generate, generate_scored, stream
from decoding.params import SamplingParams, Stop
from decoding.sampling import process_logits

transformers = pytest.importorskip("transformers")
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


SHAPES = [{"n_kv_heads": 4}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"sliding_window": 5}, {"tie_embeddings": False}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_greedy_batch_equals_uncached_decoding(shape):
    model = small_model(**shape)
    prompts = random_prompts([1, 7, 3, 30, 7])
    expected = [uncached(model, p, 12) for p in prompts]
    expected[3] = uncached(model, prompts[3], 11)  # 40 positions hold 30 + 10 ids, and one more is predicted
    assert generate(model, prompts, GREEDY) == expected


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 100), st.sets(st.integers(0, 60)))
@settings(max_examples=25, deadline=None)
def test_rows_stop_independently(lengths, seed, stop):
    model = small_model()
    prompts = random_prompts(lengths, seed=seed)
    expected = [uncached(model, p, 12, tuple(stop)) for p in prompts]
    assert generate(model, prompts, GREEDY, Stop(stop)) == expected


def test_no_prompts_and_one():
    model = small_model()
    assert generate(model, [], GREEDY) == []
    assert generate(model, [[4]], GREEDY) == [uncached(model, [4], 12)]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_greedy_equals_transformers_generate(tmp_path, n_kv_heads):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=5,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(n_kv_heads)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    prompts = random_prompts([3, 11, 6], 97)
    expected = []
    for prompt in prompts:
        ids = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0, len(prompt) :].tolist()
        expected.append(ids[: ids.index(5)] if 5 in ids else ids)
    params = SamplingParams(temperature=0, max_new_tokens=40)
    assert generate(load_model(tmp_path), prompts, params, Stop([5])) == expected


def test_greedy_text_of_a_trained_model(shared):
    model = load_model(shared / "models" / "stories260K_hf")
    expected = json.loads((shared / "models" / "stories260K_expected.json").read_text())["greedy"]
    prompts = [entry["prompt_ids"] for entry in expected]
    params = SamplingParams(temperature=0, max_new_tokens=200)
    answers = generate(model, prompts, params, Stop([2]))
    assert [p + a for p, a in zip(prompts, answers)] == [entry["ids"] for entry in expected]


SAMPLED = SamplingParams(temperature=1.5, top_k=20, top_p=0.98, repetition_penalty=1.2, max_new_tokens=12, seed=7)


def test_a_sample_does_not_depend_on_its_batch():
    model = small_model()
    prompts = random_prompts([5, 2, 9, 4])
    together = generate(model, prompts, SAMPLED, Stop([1, 2, 3]))
    alone = [generate(model, [p], SAMPLED, Stop([1, 2, 3]), seeds=[7 + i])[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert generate(model, prompts[::-1], SAMPLED, Stop([1, 2, 3]), seeds=[10, 9, 8, 7]) == together[::-1]
    assert generate(model, prompts, dataclasses.replace(SAMPLED, seed=8), Stop([1, 2, 3])) != together


def test_the_first_token_is_sampled_by_the_settings_too():
    model = small_model()
    n, prompt = 4000, [3, 1, 4]
    params = SamplingParams(temperature=2, top_k=3, max_new_tokens=1)
    drawn = torch.tensor([ids[0] for ids in generate(model, [prompt] * n, params)])
    with torch.no_grad():
        logits = process_logits(model(torch.tensor([prompt]))[:, -1], [prompt], params)[0]
    keep = logits.isfinite()
    counts = drawn.bincount(minlength=61)
    assert counts.sum() == counts[keep].sum() == n
    assert chi_square(counts[keep], logits.softmax(-1)[keep]) < 18.4  # 2 degrees of freedom, once in 10 000


def test_log_probabilities_are_the_models_own():
    model = small_model()
    prompts = random_prompts([5, 2, 9, 4])
    answers = generate_scored(model, prompts, SAMPLED, Stop([1, 2, 3]), top=4)
    assert [[token.id for token in answer] for answer in answers] == generate(model, prompts, SAMPLED, Stop([1, 2, 3]))
    for prompt, answer in zip(prompts, answers):
        ids = [token.id for token in answer]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        for token, row in zip(answer, logprobs):
            best = row.topk(4)
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-5)  # the softmax is in float32
            assert [i for i, _ in token.top] == best.indices.tolist()
            assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    everything = generate_scored(model, prompts[:1], GREEDY, top=99)[0]
    assert all(token.top[0] == (token.id, token.logprob) and len(token.top) == 61 for token in everything)
    assert generate_scored(model, prompts[:1], GREEDY)[0][0].top == ()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 100), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_rows_end_independently_by_what_they_said(lengths, seed, divisor):
    model = small_model()
    prompts = random_prompts(lengths, seed=seed)
    full = [uncached(model, p, 12) for p in prompts]
    expected = []
    for ids in full:
        ends = [n for n in range(1, 13) if sum(ids[:n]) % 5 == divisor]
        expected.append(ids[: ends[0]] if ends else ids)
    assert generate(model, prompts, GREEDY, Stop(ended=lambda ids: sum(ids) % 5 == divisor)) == expected


def test_stops_when_the_context_is_full():
    model = small_model(max_seq_len=16)
    prompts = random_prompts([16, 15, 2])
    answers = generate(model, prompts, SamplingParams(temperature=0, max_new_tokens=99))
    assert [len(a) for a in answers] == [1, 2, 15]
    assert answers[2] == uncached(model, prompts[2], 15)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([[1], []], r"prompt 2 of 2 is empty"),
        ([[1] * 41], r"the prompt is 41 tokens long, the model takes 40"),
        ([[1, 61]], r"id 61, the model has 0\.\.60"),
        ([[-1, 3]], r"id -1, the model has 0\.\.60"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_at_once(prompts, sentence):
    model = small_model()
    with pytest.raises(ValueError, match=sentence):
        generate(model, prompts, GREEDY)
    with pytest.raises(ValueError, match=sentence.replace("prompt 2 of 2", "the prompt")):
        stream(model, prompts[-1], GREEDY)
    check_prompts(model, [[0], [60] * 40])


def test_the_mode_of_the_model_is_left_as_it_was():
    model = small_model().train()
    generate(model, [[1, 2]], GREEDY)
    assert model.training
    ids = stream(model.eval(), [1, 2], GREEDY)
    next(ids)
    ids.close()
    assert not model.training


# ---- streaming


def test_stream_equals_generate():
    model = small_model()
    for prompt in random_prompts([1, 5, 39]):
        assert list(stream(model, prompt, SAMPLED, Stop([9]))) == generate(model, [prompt], SAMPLED, Stop([9]))[0]


@pytest.mark.parametrize("cached", [0, 1, 5, 8])
def test_stream_goes_on_from_a_cache(cached):
    model = small_model()
    prompt = random_prompts([9])[0]
    cache = model.make_cache(1)
    if cached:
        Feeder(model, cache)([prompt[:cached]], [0])
    answer = list(stream(model, prompt, GREEDY, cache=cache))
    assert answer == uncached(model, prompt, 12)
    assert cache.length == len(prompt) + 11


def test_stream_refuses_a_cache_that_holds_the_whole_prompt():
    model = small_model()
    cache = model.make_cache(1)
    Feeder(model, cache)([[1, 2, 3]], [0])
    with pytest.raises(ValueError, match="the cache holds 3 ids, the prompt 3"):
        stream(model, [1, 2, 3], GREEDY, cache=cache)


def test_an_interrupted_pass_leaves_a_usable_cache(monkeypatch):
    monkeypatch.setattr("decoding.cpu_step.stepper", lambda *_: None)  # a compiled step is not interrupted halfway
    model = small_model()
    cache = model.make_cache(1)
    ids = stream(model, [1, 2, 3], GREEDY, cache=cache)
    start = [next(ids), next(ids)]
    second = model.model.layers[1]
    monkeypatch.setattr(second, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        next(ids)
    monkeypatch.undo()
    assert cache.length == 4  # the prompt and the first id
    rest = list(stream(model, [1, 2, 3, *start], GREEDY, cache=cache))
    assert rest == uncached(model, [1, 2, 3, *start], 12)


def test_batches_give_what_one_batch_gives(capsys, monkeypatch):
    model, prompts = small_model(), random_prompts([5, 2, 9, 4, 1])
    together, decoder = generate(model, prompts, SAMPLED, Stop([3])), Sampled(model)
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0)
    assert list(decoder.answers(prompts, SAMPLED, Stop([3]), batch_size=2)) == together
    assert "4 of 5 answers" in capsys.readouterr().err
    assert list(decoder.answers([], SAMPLED)) == []
    first = [ids[:1] for ids in together]
    assert list(decoder.answers(prompts, SAMPLED, Stop([3], lambda ids: True), batch_size=2)) == first

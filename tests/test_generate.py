"""Decoding against transformers' warpers and `generate`, against uncached float64, and against exact probabilities."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as g
from checkpoint import load_model
from generate import ChatSession, SamplingParams, check_prompts, draw, generate, process_logits, stream, text_pieces
from model import ModelArgs, Transformer

transformers = pytest.importorskip("transformers")
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


def small_model(**changes) -> Transformer:
    """A float64 model whose logits are far enough apart to have a clear argmax."""
    torch.manual_seed(5)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61, "max_seq_len": 40}
    model = Transformer(ModelArgs(**(shape | changes))).double()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_prompts(lengths: list[int], vocab_size: int = 61, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def uncached(model, prompt: list[int], n: int, stop: tuple[int, ...] = ()) -> list[int]:
    """Greedy decoding the dumbest way: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


# ---- process_logits and draw


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


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_draw_follows_the_exact_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, -2.0, -torch.inf])
    n = 200_000
    drawn = torch.tensor(draw(logits.expand(n, 8), [torch.Generator().manual_seed(3)] * n))
    counts = drawn.bincount(minlength=8)
    assert counts[7] == 0
    # chi-square with 6 degrees of freedom exceeds 27.9 once in 10 000; the seed is fixed
    assert chi_square(counts[:7], logits.softmax(-1)[:7]) < 27.9


def test_first_draws_of_neighbouring_seeds_follow_them_too():
    logits, n = torch.tensor([1.0, 0.0, 0.5, -0.5]), 20_000
    drawn = draw(logits.expand(n, 4), [torch.Generator().manual_seed(seed) for seed in range(n)])
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
    drawn = draw(torch.tensor([values]), [torch.Generator().manual_seed(seed)])
    assert values[drawn[0]] > -math.inf


def test_draw_at_both_ends_of_the_unit_interval(monkeypatch):
    logits = torch.tensor([[-math.inf, 0.3, 0.1, 0.2, -math.inf]])
    for u, expected in ((0.0, 1), (1 - 2**-53, 3)):
        monkeypatch.setattr(g.torch, "rand", lambda *_, u=u, **__: torch.tensor([u], dtype=torch.float64))
        assert draw(logits, [torch.Generator()]) == [expected]


SENSELESS = [("temperature", -0.1), ("temperature", 0.001), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0)]
SENSELESS += [("top_p", 1.1), ("min_p", -0.5), ("repetition_penalty", 0.0), ("max_new_tokens", 0), ("seed", -1)]


@pytest.mark.parametrize(("field", "value"), SENSELESS)
def test_params_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} should be .*found {value}"):
        SamplingParams(**{field: value})


# ---- the decoding loop

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
    assert generate(model, prompts, GREEDY, stop) == expected


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
    assert generate(load_model(tmp_path), prompts, params, stop_ids=[5]) == expected


def test_greedy_text_of_a_trained_model(shared):
    model = load_model(shared / "models" / "stories260K_hf")
    expected = json.loads((shared / "models" / "stories260K_expected.json").read_text())["greedy"]
    prompts = [entry["prompt_ids"] for entry in expected]
    params = SamplingParams(temperature=0, max_new_tokens=200)
    answers = generate(model, prompts, params, stop_ids=[2])
    assert [p + a for p, a in zip(prompts, answers)] == [entry["ids"] for entry in expected]


SAMPLED = SamplingParams(temperature=1.5, top_k=20, top_p=0.98, repetition_penalty=1.2, max_new_tokens=12, seed=7)


def test_a_sample_does_not_depend_on_its_batch():
    model = small_model()
    prompts = random_prompts([5, 2, 9, 4])
    together = generate(model, prompts, SAMPLED, stop_ids=[1, 2, 3])
    alone = [generate(model, [p], SAMPLED, [1, 2, 3], seeds=[7 + i])[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert generate(model, prompts[::-1], SAMPLED, [1, 2, 3], seeds=[10, 9, 8, 7]) == together[::-1]
    assert generate(model, prompts, dataclasses.replace(SAMPLED, seed=8), [1, 2, 3]) != together


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
        assert list(stream(model, prompt, SAMPLED, [9])) == generate(model, [prompt], SAMPLED, [9])[0]


@pytest.mark.parametrize("cached", [0, 1, 5, 8])
def test_stream_goes_on_from_a_cache(cached):
    model = small_model()
    prompt = random_prompts([9])[0]
    cache = model.make_cache(1)
    if cached:
        g.last_logits(model, [prompt[:cached]], [0], cache)
    answer = list(stream(model, prompt, GREEDY, cache=cache))
    assert answer == uncached(model, prompt, 12)
    assert cache.length == len(prompt) + 11


def test_stream_refuses_a_cache_that_holds_the_whole_prompt():
    model = small_model()
    cache = model.make_cache(1)
    g.last_logits(model, [[1, 2, 3]], [0], cache)
    with pytest.raises(ValueError, match="the cache holds 3 ids, the prompt 3"):
        stream(model, [1, 2, 3], GREEDY, cache=cache)


def test_an_interrupted_pass_leaves_a_usable_cache(monkeypatch):
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


class ByteTokenizer:
    """Ids are bytes; 256 and up are special."""

    def id_to_bytes(self, i: int) -> bytes:
        return bytes([i]) if i < 256 else b""

    def decode(self, ids) -> str:
        return b"".join(map(self.id_to_bytes, ids)).decode("utf8", errors="replace")


@given(st.text(max_size=30), st.integers(0, 3))
@settings(deadline=None)
def test_text_pieces_are_whole_characters(text, cut):
    ids = [300, *text.encode(), 301]
    pieces = list(text_pieces(ByteTokenizer(), ids))
    assert "".join(pieces) == text
    assert all(len(piece) == 1 for piece in pieces)
    torn = text.encode()[: len(text.encode()) - cut]
    assert "".join(text_pieces(ByteTokenizer(), torn)) == torn.decode("utf8", errors="replace")


def test_batches_give_what_one_batch_gives(capsys, monkeypatch):
    model, prompts = small_model(), random_prompts([5, 2, 9, 4, 1])
    together = generate(model, prompts, SAMPLED, [3])
    monkeypatch.setattr(g, "PLAIN_LINE_SECONDS", 0)
    assert list(g.generate_in_batches(model, prompts, SAMPLED, [3], batch_size=2)) == together
    assert "4 of 5 answers" in capsys.readouterr().err
    assert list(g.generate_in_batches(model, [], SAMPLED)) == []


def test_text_pieces_come_as_soon_as_they_are_complete():
    fed = []
    pieces = text_pieces(ByteTokenizer(), (fed.append(i) or i for i in "a诗b".encode()))
    assert (next(pieces), len(fed)) == ("a", 1)
    assert (next(pieces), len(fed)) == ("诗", 4)


# ---- chat


class Template:
    """A chat format over bytes and four markers, the shape of the real one."""

    stop_ids = (259,)

    def encode(self, messages, add_generation_prompt=False):
        ids, role = [], {"system": 256, "user": 257, "assistant": 258}
        for message in messages:
            ids += [role[message["role"]], *message["content"].encode(), 259]
        return ids + [258] * add_generation_prompt, None


CHAT = SamplingParams(temperature=0, max_new_tokens=10)


class ASCIIModel(Transformer):
    """Only ids 97..122 and the end marker come out, so that answers re-encode to the same ids."""

    def logits(self, hidden):
        allowed = torch.zeros(self.args.vocab_size, dtype=torch.bool)
        allowed[[*range(97, 123), 259]] = True
        return super().logits(hidden).masked_fill(~allowed, -torch.inf)


def chat_model(max_seq_len: int = 120) -> Transformer:
    torch.manual_seed(1)
    model = ASCIIModel(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=260, max_seq_len=max_seq_len))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def fed_tokens(model: Transformer, monkeypatch) -> list[int]:
    """A list that grows by the number of tokens of every forward pass."""
    widths, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, **kw: widths.append(tokens.numel()) or hidden(tokens, **kw))
    return widths


@pytest.mark.parametrize("system", ["", "be brief"])
def test_each_turn_equals_the_whole_conversation_from_scratch(monkeypatch, system):
    model, template, tokenizer = chat_model(), Template(), ByteTokenizer()
    session = ChatSession(model, tokenizer, template, system)
    history = [{"role": "system", "content": system}] if system else []
    for turn, question in enumerate(["hello", "and then", "??"]):
        widths = fed_tokens(model, monkeypatch)
        params = dataclasses.replace(CHAT, temperature=0.8, seed=3)
        answer = list(session.ask(question, params))
        monkeypatch.undo()
        history.append({"role": "user", "content": question})
        prompt, _ = template.encode(history, add_generation_prompt=True)
        expected = generate(model, [prompt], dataclasses.replace(params, seed=3 + turn), template.stop_ids)[0]
        assert answer == expected
        if turn:  # the question with its three markers, and what the answer before left unfed
            assert widths[0] <= len(question) + 5
        history.append({"role": "assistant", "content": tokenizer.decode(answer)})
        assert session.system + session.messages == history


def test_the_oldest_turns_go_when_the_context_is_full():
    model, template = chat_model(max_seq_len=40), Template()
    session = ChatSession(model, ByteTokenizer(), template, system="s")
    for i in range(5):
        answer = list(session.ask(f"question {i}", CHAT))
        kept = session.system + session.messages[:-1]
        prompt, _ = template.encode(kept, add_generation_prompt=True)
        assert len(prompt) <= 30 and kept[0]["content"] == "s" and kept[-1]["content"] == f"question {i}"
        assert answer == generate(model, [prompt], CHAT, template.stop_ids)[0]
        assert session.forgotten + len(session.messages) // 2 == i + 1
    assert session.forgotten >= 3


def test_a_question_that_does_not_fit_leaves_the_history_alone():
    session = ChatSession(chat_model(max_seq_len=40), ByteTokenizer(), Template())
    list(session.ask("hi", CHAT))
    before = list(session.messages)
    with pytest.raises(ValueError, match="the prompt is 53 tokens long, the model takes 40"):
        session.ask("x" * 50, CHAT)
    assert session.messages == before and session.forgotten == 0
    assert len(list(session.ask("x" * 30, CHAT))) >= 1  # less room than asked for, but some


def test_an_answer_cut_short_enters_the_history():
    model = chat_model()
    session = ChatSession(model, ByteTokenizer(), Template())
    answer = session.ask("hello", CHAT)
    said = [next(answer), next(answer)]
    answer.close()
    assert session.messages[-1] == {"role": "assistant", "content": ByteTokenizer().decode(said)}
    following = list(session.ask("go on", CHAT))
    prompt, _ = Template().encode(session.messages[:-1], add_generation_prompt=True)
    assert following == generate(model, [prompt], CHAT, Template.stop_ids)[0]
    session.ask("never read", CHAT)  # an answer nobody asked for changes nothing
    assert len(session.messages) == 4
    session.reset()
    assert session.messages == []

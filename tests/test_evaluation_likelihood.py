"""Log-probabilities of continuations against whole rows, one at a time, in float64."""

import random

import pytest
import torch
from helpers.small_model import small_model

from checkpoint.transformers_model import TransformersModel
from evaluation import likelihood
from evaluation.branches import BranchCache, Branches, join
from evaluation.last_block import hidden_at
from evaluation.likelihood import Pair, encode_pair, log_likelihoods, windows

WINDOW = 48


def brute_force(model, pair: Pair) -> tuple[float, bool]:
    """The model reads the text once, without cache, padding or neighbours."""
    ids = [*pair.context, *pair.continuation][-(WINDOW + 1) :]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)[-len(pair.continuation) :]
    target = torch.tensor(pair.continuation)
    return logprobs.gather(-1, target[:, None]).sum().item(), bool((logprobs.argmax(-1) == target).all())


@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("shared", [0, 5, 20])
def test_log_likelihoods_are_those_of_whole_rows(shared, batch_size, scaling, monkeypatch):
    monkeypatch.setattr(likelihood, "HEAD_ELEMENTS", 1)  # the head is computed in several parts
    rng = random.Random(shared)
    model = small_model(max_seq_len=WINDOW, rope_scaling=scaling, n_kv_heads=1)
    beginning = [rng.randrange(50) for _ in range(shared)]
    pairs = []
    for length in (1, 1, 3, 9, 20, 60):  # the last is longer than the window
        context = beginning + [rng.randrange(50) for _ in range(length)]
        pairs += [Pair(context, [rng.randrange(50) for _ in range(n)]) for n in (1, 1, 2, 7)]
    pairs.append(Pair(pairs[0].context, [rng.randrange(50) for _ in range(WINDOW)]))
    found = log_likelihoods(model, pairs, batch_size)
    for pair, (logprob, greedy, cut) in zip(pairs, found):
        expected, likeliest = brute_force(model, pair)
        assert logprob == pytest.approx(expected, abs=2e-4)
        assert greedy == likeliest
        assert cut == (len(pair.context) + len(pair.continuation) > WINDOW + 1)


def test_the_likeliest_continuation_is_called_greedy():
    model = small_model(max_seq_len=WINDOW)
    with torch.no_grad():
        best = model(torch.tensor([[1, 2, 3]]))[0, -1].argmax().item()
    found = log_likelihoods(model, [Pair([1, 2, 3], [best]), Pair([1, 2, 3], [(best + 1) % 50])], 4)
    assert [likelihood.greedy for likelihood in found] == [True, False]


def test_texts_without_ids_or_beyond_the_window_are_refused():
    model = small_model(max_seq_len=WINDOW)
    with pytest.raises(ValueError, match="a context should have at least 1 id"):
        log_likelihoods(model, [Pair([5], [1]), Pair([], [1, 2])], 4)
    for continuation in ([], [1] * (WINDOW + 1)):
        with pytest.raises(ValueError, match=f"from 1 to {WINDOW} ids .* found {len(continuation)}"):
            log_likelihoods(model, [Pair([1], continuation)], 4)
    assert log_likelihoods(model, [], 4) == []


@pytest.mark.parametrize(("n", "length", "stride"), [(2, 5, 2), (6, 5, 5), (7, 5, 2), (40, 7, 1), (41, 8, 8)])
def test_windows_judge_every_id_once(n, length, stride):
    ids = list(range(n))
    pairs = list(windows(ids, length, stride))
    assert [i for _, continuation in pairs for i in continuation] == ids[1:]
    for context, continuation in pairs:
        assert list(range(context[0], continuation[-1] + 1)) == [*context, *continuation]  # nothing is left out
        assert len(context) + len(continuation) <= length + 1
    for context, _ in pairs[1:]:
        assert len(context) >= length + 1 - stride


class Letters:
    """A tokenizer with an id for each character; `begins` as it is asked for."""

    def __init__(self, begins: list[int], bos_id: int | None) -> None:
        self.begins, self.bos_id, self.eos_id, self.special = begins, bos_id, 2, {}

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


@pytest.mark.parametrize(
    ("begins", "bos_id", "context", "continuation", "expected"),
    [
        ([], None, "ab", " c", ("ab", " c")),
        ([1], 1, "ab", " c", ("\1ab", " c")),
        ([1], 1, "ab ", "c", ("\1ab", " c")),  # the space belongs to the word behind it
        ([1], 1, "", "cd", ("\1", "cd")),
        ([], 1, "", "cd", ("\1", "cd")),
        ([], None, "", "cd", ("\2", "cd")),  # without bos, a text follows the end of another
    ],
)
def test_a_pair_is_encoded_as_one_text(begins, bos_id, context, continuation, expected):
    pair = encode_pair(Letters(begins, bos_id), context, continuation)
    assert ("".join(map(chr, pair.context)), "".join(map(chr, pair.continuation))) == expected


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 7}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}], ids=str
)
@pytest.mark.parametrize("shared", [0, 12])
def test_texts_that_part_later_are_computed_together(shared, options, monkeypatch):
    rng = random.Random(shared)
    model = small_model(max_seq_len=WINDOW, n_kv_heads=1, **options)

    def ids(n: int) -> list[int]:
        return [rng.randrange(50) for _ in range(n)]

    start, begins, pairs = ids(shared), [ids(9) for _ in range(3)], []
    for begin in begins:
        half = begin + ids(4)
        for context in (begin, half, half + ids(3), begin[:-2] + ids(3), begin[:2] + ids(8)):  # also one within another
            pairs += [Pair(start + context, ids(n)) for n in (1, 3, 6)]
        pairs.append(Pair(start + begin[:1], begin[1:]))  # what is judged lies in what is shared
    fed, hidden = [], model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda tokens, **options: fed.append(tokens.numel()) or hidden(tokens, **options)
    )
    found = log_likelihoods(model, pairs, batch_size=7)
    monkeypatch.undo()
    for pair, (logprob, greedy, _) in zip(pairs, found):
        expected, likeliest = brute_force(model, pair)
        assert logprob == pytest.approx(expected, abs=2e-4) and greedy == likeliest
    assert max(len(row.paths) for row in join(sorted({(*start, *begins[0], i) for i in range(20)}), 0, 999, 7)) == 7
    apart = sum(len(pair.context) + len(pair.continuation) - 1 - shared for pair in pairs)
    assert (sum(fed) < 0.7 * apart) == ("rope_scaling" not in options)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"qk_norm": True, "attention_bias": True}], ids=str)
@pytest.mark.parametrize("past", [0, 4])
def test_the_last_block_in_a_few_places_is_that_of_all_places(past, options, monkeypatch):
    model = small_model(max_seq_len=WINDOW, n_kv_heads=1, **options)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (3, past + 12), generator=generator)
    places = torch.tensor([[11, 2], [0, 0], [5, 6]])
    tokens[:, :past] = tokens[0, :past]  # all rows begin alike
    cache = None
    with torch.no_grad():
        expected = model.hidden(tokens)[torch.arange(3)[:, None], past + places]
        if past:
            prefix = model.make_cache(1, WINDOW)
            model.hidden(tokens[:1, :past], cache=prefix, lengths=[past])
            rows = [Branches([*text[past:]], [*range(past, past + 12)], {text: [*range(12)]}) for text in texts(tokens)]
            cache = BranchCache(prefix, past, rows, 12)
        monkeypatch.setattr(model, "hidden", None)  # not all places
        found = hidden_at(model, tokens[:, past:], places, cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def texts(tokens: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tokens.tolist()]


def test_batches_are_small_on_a_cpu_and_have_little_padding():
    rng = random.Random(0)
    rows = [
        Branches([1] * n, [*range(n)], {(n,): [*range(n)]}) for n in sorted(rng.randrange(1, 600) for _ in range(200))
    ]
    batches = [*likelihood._batches(rows, 32, small=True)]
    assert [row for batch in batches for row in batch] == rows
    for batch in batches:
        width = len(batch[-1].ids)
        assert len(batch) <= 32 and (len(batch) == 1 or len(batch) * width <= likelihood.PASS_TOKENS)
        assert sum(width - len(row.ids) for row in batch) <= likelihood.MOST_PADDING
    assert [len(batch) for batch in likelihood._batches(rows, 32, small=False)] == [32] * 6 + [8]


@pytest.mark.parametrize("shared", [0, 12])
def test_a_model_that_runs_through_transformers_is_judged_alike(shared):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.GPTNeoXConfig(**shape, vocab_size=50, max_position_embeddings=WINDOW)
    model = TransformersModel(transformers.GPTNeoXForCausalLM(config).double()).eval()
    rng = random.Random(shared)
    start = [rng.randrange(50) for _ in range(shared)]
    pairs = [
        Pair(start + [rng.randrange(50) for _ in range(n)], [rng.randrange(50) for _ in range(m)])
        for n, m in ((1, 1), (1, 4), (7, 2), (60, 3))
    ]
    for pair, (logprob, greedy, _) in zip(pairs, log_likelihoods(model, pairs, batch_size=3)):
        expected, likeliest = brute_force(model, pair)
        assert logprob == pytest.approx(expected, rel=1e-9) and greedy == likeliest  # all in float64

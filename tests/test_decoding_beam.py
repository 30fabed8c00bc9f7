"""Beam search against transformers', and against all sequences there are."""

import itertools

import pytest
import torch
from helpers.small_model import small_model

from checkpoint.directory import load_model
from decoding.beam import BeamParams, beam_search
from decoding.params import Stop

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model, theirs and ours."""
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        eos_token_id=5,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(config).eval()
    directory = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(directory)
    return theirs, load_model(directory)


PROMPTS = [[1], [7, 3, 9, 9, 2], [28, 4, 11]]


@pytest.mark.parametrize("stop_ids", [(5,), (5, 9, 17)], ids=str)
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_all_hypotheses_equal_transformers(pair, stop_ids, early_stopping, length_penalty):
    theirs, ours = pair
    endings = 0
    for prompt, num_beams in itertools.product(PROMPTS, (2, 5)):
        found = theirs.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=12,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=list(stop_ids),
            output_scores=True,
            return_dict_in_generate=True,
        )
        params = BeamParams(num_beams, length_penalty, early_stopping, max_new_tokens=12)
        mine = beam_search(ours, prompt, params, Stop(stop_ids))
        expected = []
        for row in found.sequences[:, len(prompt) :].tolist():
            ends = [n for n, i in enumerate(row) if i in stop_ids]
            expected.append(row[: ends[0]] if ends else row)
        assert [h.ids for h in mine] == expected
        assert [h.score for h in mine] == pytest.approx(found.sequences_scores.tolist(), abs=1e-4)  # float32 sums
        endings += sum(len(ids) < 12 for ids in expected)
    assert endings  # some end with a stop id, so that the bookkeeping of finished ones is at work


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
def test_with_room_for_all_it_finds_the_best_of_all_sequences(length_penalty):
    model, prompt, stop, length = small_model(vocab_size=4), [2, 1], 3, 4
    sequences = []
    for size in range(1, length + 1):
        for ids in itertools.product(range(4), repeat=size):
            if stop not in ids[:-1] and (size == length or ids[-1] == stop):
                with torch.no_grad():
                    logprobs = model(torch.tensor([[*prompt, *ids]]))[0].log_softmax(-1)
                total = sum(float(logprobs[len(prompt) - 1 + n, i]) for n, i in enumerate(ids))
                sequences.append((total / size**length_penalty, total, [i for i in ids if i != stop]))
    sequences.sort(key=lambda s: -s[0])
    params = BeamParams(4**length, length_penalty, "never", max_new_tokens=length)
    found = beam_search(model, prompt, params, Stop([stop]))
    assert [h.ids for h in found] == [ids for *_, ids in sequences]
    assert [h.logprob for h in found] == pytest.approx([total for _, total, _ in sequences], abs=1e-5)


def test_one_beam_is_greedy_and_the_context_ends_it(pair):
    model = pair[1]
    for prompt in ([3] * 60, [3] * 64):
        found = beam_search(model, prompt, BeamParams(1, max_new_tokens=99))
        ids = list(prompt)
        while len(ids) < 65:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert [h.ids for h in found] == [ids[len(prompt) :]]


def test_a_sequence_that_has_ended_is_finished(pair):
    found = beam_search(pair[1], [1], BeamParams(3, max_new_tokens=8), Stop(ended=lambda ids: sum(ids) % 3 == 0))
    assert len(found) == 3
    for hypothesis in found:
        sums = list(itertools.accumulate(hypothesis.ids))
        assert all(total % 3 for total in sums[:-1]) and (len(sums) == 8 or sums[-1] % 3 == 0)


def test_what_makes_no_sense_is_refused(pair):
    with pytest.raises(ValueError, match="num_beams should be at least 1, found 0"):
        BeamParams(num_beams=0)
    with pytest.raises(ValueError, match="max_new_tokens should be at least 1, found 0"):
        BeamParams(max_new_tokens=0)
    with pytest.raises(ValueError, match="length_penalty should be from -100 to 100, found nan"):
        BeamParams(length_penalty=float("nan"))
    with pytest.raises(ValueError, match=r"id 29, the model has 0\.\.28"):
        beam_search(pair[1], [29], BeamParams())

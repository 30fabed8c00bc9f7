"""Samples of a run: the same prompts at every evaluation, and not one bit of the losses changed."""

import json

import pytest
import torch
from helpers.tiny_training_run import EOS, VOCAB, losses, quick, rows, toy_bin, toy_data, toy_trainer  # noqa: F401

from bins.token_bin import TokenBin
from files import read_rows
from training import samples
from training.log import read_metrics
from training.samples import FILE, Prompt, Sampler, beginnings


def read_samples(run):
    return read_rows(run / FILE)


def words(ids):
    return " ".join(map(str, ids))


def make(trainer, prompts=None, tokens=5):
    prompts = [Prompt("three", [3, 6, 9]), Prompt("four", [4], "7 10")] if prompts is None else prompts
    trainer.sampler = Sampler(trainer.model, prompts, tokens, decode=words, stop_ids=[EOS], n_ids=VOCAB)
    return trainer


def train(run, data, sampled, **changes):
    torch.manual_seed(0)
    trainer = toy_trainer(run, data, max_steps=9, eval_interval=3, eval_data=data, eval_batches=2, **changes)
    if sampled:
        make(trainer)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two equal runs, with and without samples."""
    folder = tmp_path_factory.mktemp("runs")
    data = toy_data(folder)
    return folder, data, train(folder / "plain", data, False), train(folder / "sampled", data, True)


def test_losses_and_weights_are_the_same_bits_with_and_without_samples(runs):
    folder, _, plain, sampled = runs
    assert rows(folder / "plain") == rows(folder / "sampled")
    for a, b in zip(plain.model.parameters(), sampled.model.parameters()):
        assert torch.equal(a, b)
    assert not (folder / "plain" / "samples.jsonl").exists()


def test_every_evaluation_has_a_sample_of_every_prompt(runs):
    folder, *_ = runs
    found = read_samples(folder / "sampled")
    assert [(row["step"], row["prompt"]) for row in found] == [(s, p) for s in (3, 6, 9) for p in ("three", "four")]
    assert all(len(row["text"].split()) <= 5 for row in found) and any(row["text"] for row in found)
    assert [row.get("real") for row in found[:2]] == [None, "7 10"]


def test_a_sample_is_drawn_from_the_model_of_its_step(runs):
    """With a state of its own: as `generate` gives it for the last weights."""
    from decoding.generate import generate
    from decoding.params import SamplingParams, Stop

    folder, _, _, sampled = runs
    last = [row["text"] for row in read_samples(folder / "sampled") if row["step"] == 9]
    torch.manual_seed(123)
    ids = generate(sampled.model, [[3, 6, 9], [4]], SamplingParams(max_new_tokens=5), Stop([EOS]))
    assert last == [words(answer) for answer in ids]


def test_a_resumed_run_has_each_step_once(runs, tmp_path):
    _, data, *_ = runs
    torch.manual_seed(0)
    trainer = make(toy_trainer(tmp_path, data, max_steps=6, eval_interval=3, eval_data=data, eval_batches=2))
    trainer.fit()
    whole = read_samples(tmp_path)
    # as after a kill: a step that the checkpoint does not know, and a line that was cut off
    text = (tmp_path / "samples.jsonl").read_text() + json.dumps({"step": 8, "prompt": "x", "text": "y"}) + '\n{"st'
    (tmp_path / "samples.jsonl").write_text(text)
    make(trainer).sampler.write(tmp_path, 6, trainer.backend)
    assert read_samples(tmp_path) == whole


def test_samples_that_fail_do_not_stop_the_run(runs, tmp_path, capsys, monkeypatch):
    _, data, *_ = runs

    def full(*_):
        raise OSError("no space left on the device")

    monkeypatch.setattr("training.samples.write_json_lines", full)
    result = make(toy_trainer(tmp_path, data, max_steps=2, eval_data=data, eval_batches=1)).fit()
    assert result["steps"] == 2 and "no samples of step 2: no space left" in capsys.readouterr().err


def test_without_held_out_data_there_is_a_sample_at_the_end(runs, tmp_path):
    _, data, *_ = runs
    make(toy_trainer(tmp_path, data, max_steps=2)).fit()
    assert [row["step"] for row in read_samples(tmp_path)] == [2, 2]


@pytest.mark.parametrize("of", ["weight", "module"])
def test_none_are_written_where_a_rank_holds_a_part_of_the_model(runs, tmp_path, of):
    _, data, *_ = runs
    trainer = make(toy_trainer(tmp_path, data, max_steps=2))
    if of == "weight":
        trainer.model.embedding.weight.placements = "as a DTensor has them"
    else:
        trainer.model.model.layers[0].unshard = "as FSDP2 has it"
    trainer.fit()
    assert read_samples(tmp_path) == []


def test_a_prompt_longer_than_the_context_is_left_out(runs):
    *_, sampled = runs
    longest = sampled.model.args.max_seq_len
    sampler = Sampler(sampled.model, [Prompt("x", [3] * longest)], 5, decode=words, stop_ids=[EOS], n_ids=VOCAB)
    assert sampler.prompts == []


def test_a_sample_is_shown_every_minute_one_prompt_after_the_other(runs, tmp_path, monkeypatch, capsys):
    folder, data, *_ = runs
    now = [0.0]
    monkeypatch.setattr(samples, "monotonic", lambda: now[0])
    torch.manual_seed(0)
    trainer = make(toy_trainer(tmp_path / "run", data, max_steps=9, sample_minutes=1.0))
    inner = trainer.backend.step

    def step(max_norm):
        now[0] += 25.0
        return inner(max_norm)

    trainer.backend.step = step
    trainer.fit()
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a sample")]
    # after 75 and 150 seconds; none at the end, where those of an evaluation are written
    assert [line.partition(" | ")[0] for line in shown] == [f"a sample after step {s}" for s in ("3: three", "6: four")]
    assert losses(tmp_path / "run") == losses(folder / "plain")


def test_beginnings_of_held_out_documents(tmp_path):
    tokens = toy_bin(tmp_path)
    for bare in (False, True):  # also of a bin without an index
        if bare:
            (tmp_path / "bare.bin").write_bytes((tmp_path / "train.bin").read_bytes())
            tokens = TokenBin(tmp_path / "bare.bin")
        prompts = beginnings(tokens, words, EOS)
        assert len(prompts) == 4
        for prompt in prompts:
            assert prompt.ids[0] == EOS and prompt.text == words(prompt.ids[1:])
            first = prompt.ids[1]  # documents count upwards in threes
            assert prompt.real.split()[0] == str((first - 3 + 3 * (len(prompt.ids) - 1)) % (VOCAB - 3) + 3)


def test_the_loss_of_the_first_step_is_kept_where_no_line_has_it(runs, tmp_path):
    _, data, *_ = runs
    torch.manual_seed(0)
    toy_trainer(tmp_path / "a", data, max_steps=4, log_interval=4).fit()
    torch.manual_seed(0)
    toy_trainer(tmp_path / "b", data, max_steps=4, log_interval=1).fit()
    first = next(row for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "first_step" in row)
    assert first == {"step": 1, "first_step": read_metrics(tmp_path / "b" / "metrics.jsonl")[0]["loss"]}

"""What is measured on held-out data, against the same by hand."""

import dataclasses
import math

import numpy
import pytest
import torch
from helpers.tiny_training_run import EOS, SHAPE, VOCAB, Changed, quick, toy_bin, toy_data  # noqa: F401

from dataset import IGNORE, PretrainData
from model import Transformer
from model_args import ModelArgs
from training.heldout import evaluate, loss_error
from training.log import format_metrics


def test_names_of_tasks_stay_as_they_are():
    assert format_metrics({"loss": 3, "loss_error": 0.25}) == "loss 3.0000 (standard error 0.2500)"
    assert format_metrics({"bits_per_byte": 1, "loss/med_zh": 2}) == "bits per byte 1.0000, loss/med_zh 2.0000"


def test_bits_per_byte_by_hand(tmp_path):
    data = PretrainData([toy_bin(tmp_path, documents=5)], seq_len=7, batch_size=4, seed=0)
    model = Transformer(ModelArgs(**SHAPE))
    token_bytes = torch.arange(VOCAB).numpy() % 5
    token_bytes[EOS] = 0
    nats, targets, n_bytes = 0.0, 0, 0
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        log_p = model(batch.tokens).double().log_softmax(-1)
        for row in range(4):
            for t in range(7):
                target = batch.targets[row, t].item()
                if target != IGNORE:
                    nats -= log_p[row, t, target].item()
                    targets += 1
                    n_bytes += int(token_bytes[target])
    assert targets == len(data.bins[0])
    metrics = evaluate(model, data, token_bytes)
    assert metrics == pytest.approx({"loss": nats / targets, "bits_per_byte": nats / math.log(2) / n_bytes}, rel=1e-5)
    assert evaluate(model, data).keys() == {"loss"}
    assert evaluate(model, data, token_bytes, micro_batch_size=3) == pytest.approx(metrics, rel=1e-6)  # float32 sums
    first = evaluate(model, data, max_batches=1)["loss"]
    batch = data.batch(0)
    loss, count = model(batch.tokens, batch.targets)
    assert first == pytest.approx((loss / count).item(), rel=1e-6)


def test_standard_error_is_the_spread_of_repeated_measurements():
    """Of 4,000 data sets with 60 batches of unequal sizes: the spread of their losses is what each of them states."""
    random = numpy.random.default_rng(0)
    targets = random.integers(50, 200, (4000, 60)).astype(float)
    nats = targets * (3 + 0.4 * random.standard_normal((4000, 60)))
    spread = (nats.sum(1) / targets.sum(1)).std()
    stated = [loss_error(*rows) for rows in zip(nats.tolist(), targets.tolist())]
    assert numpy.mean(stated) == pytest.approx(spread, rel=0.04)  # 1 / sqrt(2 * 4000) = 1.1 %, and the linearization


def test_standard_error_of_a_model_by_hand(tmp_path):
    data = toy_data(tmp_path)
    model = Transformer(ModelArgs(**SHAPE))
    torch.nn.init.normal_(model.lm_head.weight)
    sums = []
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        loss, n = model(batch.tokens, batch.targets)
        sums.append((loss.item(), int(n)))
    mean = sum(loss for loss, _ in sums) / sum(n for _, n in sums)
    n_batches, n_targets = len(sums), sum(n for _, n in sums)
    squares = sum((loss - mean * n) ** 2 for loss, n in sums)
    found = evaluate(model, data, with_error=True)
    assert n_batches > 1
    assert found["loss_error"] == pytest.approx((squares * n_batches / (n_batches - 1)) ** 0.5 / n_targets, rel=1e-4)
    assert evaluate(model, data, max_batches=1, with_error=True).keys() == {"loss"}


def test_losses_of_groups_and_their_mean_by_hand(tmp_path):
    """Most targets are of group 0 and none is of group 2: the mean over targets is next to the loss of group 0."""

    def change(step, batch):
        return dataclasses.replace(batch, groups=(batch.targets % 10 == 0).long())

    data = Changed(toy_data(tmp_path), change)
    model = Transformer(ModelArgs(**SHAPE))
    torch.nn.init.normal_(model.lm_head.weight)
    losses = [[], []]
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        log_p = model(batch.tokens).double().log_softmax(-1)
        for row, t in (batch.targets != IGNORE).nonzero().tolist():
            losses[batch.groups[row, t]].append(-log_p[row, t, batch.targets[row, t]].item())
    a, b = (sum(each) / len(each) for each in losses)
    metrics = evaluate(model, data, group_names=["a", "b", "none"])
    expected = {"loss": sum(map(sum, losses)) / sum(map(len, losses)), "loss/a": a, "loss/b": b}
    assert metrics == pytest.approx(expected | {"task_mean": (a + b) / 2}, rel=1e-6)  # float32
    assert abs(metrics["task_mean"] - metrics["loss"]) > 0.01  # the test is about something


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(tmp_path, training):
    model = Transformer(ModelArgs(**SHAPE)).train(training)
    state = torch.get_rng_state()
    evaluate(model, toy_data(tmp_path))
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)

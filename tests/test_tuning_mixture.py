"""Losses of several tasks against the same written the dumbest way in float64, whatever a step is divided into."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import backends
from chat.samples import Samples
from dataset_sft import SFTData
from model import Transformer
from model_args import ModelArgs
from training.heldout import sums_by_group
from tuning import mixture
from tuning.args import DataArgs, Task, split_paths, task_names

VOCAB = 17
LOSSES = ("token", "sample", "task_token", "task_sample")


def random_samples(n: int, seed: int, longest: int = 9) -> Samples:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, n)
    ids, mask = rng.integers(0, VOCAB, lengths.sum()), rng.random(lengths.sum()) < 0.6
    offsets = np.cumsum([0, *lengths])
    mask[offsets[1:] - 1] = True  # every sample has a target, as encode_samples takes care of
    return Samples(ids.astype(np.int32), mask, offsets.astype(np.uint64), {"samples": n})


@pytest.fixture
def model() -> Transformer:
    model = Transformer(ModelArgs(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=VOCAB, max_seq_len=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)  # else every target's loss is about log(VOCAB)
    return model.double()


def source_of(samples: Samples, groups: np.ndarray, loss: str, packing: str, rows: int, weights=(1.0, 1.0, 1.0)):
    """Batches as fine_tuning.py makes them."""
    data = SFTData(samples, 24, rows, 0, packing, groups=groups, per_sample=loss in ("sample", "task_sample"))
    return data if loss == "token" else mixture.Weighted(data, None if loss == "sample" else weights)


def brute_force(model: Transformer, samples: Samples, groups: np.ndarray, loss: str, weights) -> torch.Tensor:
    """The four cases over all samples at once, each sample alone in a forward pass."""
    token_losses = []
    for start, stop in zip(samples.offsets[:-1].astype(int), samples.offsets[1:].astype(int)):
        ids = torch.from_numpy(samples.ids[start:stop]).long()
        log_p = model.logits(model.hidden(ids[None, :-1]))[0].double().log_softmax(-1)
        losses = -log_p[torch.arange(len(ids) - 1), ids[1:]]
        token_losses.append(losses[torch.from_numpy(samples.mask[start + 1 : stop])])
    if loss == "token":
        return torch.cat(token_losses).mean()
    if loss == "sample":
        return torch.stack([x.mean() for x in token_losses]).mean()
    total, weight = 0.0, 0.0
    for k in sorted(set(groups.tolist())):
        of_task = [x for x, g in zip(token_losses, groups) if g == k]
        mean = torch.cat(of_task).mean() if loss == "task_token" else torch.stack([x.mean() for x in of_task]).mean()
        total, weight = total + weights[k] * mean, weight + weights[k]
    return total / weight


def loss_of_step(model, source, step: int, world: int, micro_batch_size: int) -> torch.Tensor:
    """What the loop makes of a step: sums of all micro-batches and ranks, over the number of all targets."""
    batches = [source.batch(step, rank, world) for rank in range(world)]
    total = sum(
        model(b.tokens, b.targets, positions=b.positions, doc_ids=b.doc_ids, loss_weights=b.loss_weights)[0]
        for batch in batches
        for b in batch.split(micro_batch_size)
    )
    return total / sum(batch.n_targets for batch in batches)


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(model.parameters()))


# ---- the loss of a step


@pytest.mark.parametrize("packing", ["best_fit", "bucket", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_every_gradient_are_those_of_the_samples_one_by_one(model, loss, packing):
    groups, weights = np.array([0, 2, 0, 0, 2, 0, 2, 0, 2, 2, 2]), (0.5, 7.0, 2.0)  # no sample of task 1
    samples = random_samples(11, 3)
    expected = brute_force(model, samples, groups, loss, weights)
    wanted = gradients(model, expected)
    for world, micro in ((1, 0), (2, 0), (1, 1), (3, 2)):
        source = source_of(samples, groups, loss, packing, 12, weights)
        assert source.steps_per_epoch == 1
        found = loss_of_step(model, source, 0, world, micro)
        # the weights are float32; with all of them 1 nothing is rounded
        tolerance = 1e-12 if loss == "token" else 2e-7
        assert found.item() == pytest.approx(expected.item(), rel=tolerance)
        for a, b in zip(gradients(model, found), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash", "flex"])
def test_packed_is_unpacked_by_every_attention_that_runs_here(model, backend):
    try:
        backends.check(backend, torch.float64, torch.device("cpu"), training=True)
    except ValueError as error:
        pytest.skip(str(error))
    samples, groups = random_samples(9, 5), np.arange(9) % 2
    with backends.use(backend):
        losses = [
            loss_of_step(model, source_of(samples, groups, "task_sample", packing, 9, (1.0, 3.0)), 0, 1, 0)
            for packing in ("best_fit", "none")
        ]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-7)  # float32 weights
        for a, b in zip(*(gradients(model, loss) for loss in losses), strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_mean_over_micro_batches_is_another_one(model, loss):
    """MFTCoder's definition, applied to each micro-batch and averaged: not the loss that a larger one would have."""
    samples, groups = random_samples(8, 4, longest=14), np.array([0, 0, 0, 1, 0, 0, 1, 0])
    rows = source_of(samples, groups, loss, "none", 8, (1.0, 1.0))
    whole = loss_of_step(model, rows, 0, 1, 0).item()
    assert whole == pytest.approx(loss_of_step(model, rows, 0, 1, 2).item(), rel=1e-12)
    pairs = source_of(samples, groups, loss, "none", 2, (1.0, 1.0))  # steps of two rows: micro-batches of their own
    local = np.mean([loss_of_step(model, pairs, step, 1, 0).item() for step in range(4)])
    if loss == "sample":  # where each micro-batch has as many samples, the mean of means is the mean
        assert local == pytest.approx(whole, rel=1e-6)
    else:
        assert abs(local - whole) > 1e-3 * whole


@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_of_the_tasks_are_told_apart(model, world):
    samples, groups = random_samples(13, 6), np.arange(13) % 3
    source = source_of(samples, groups, "token", "best_fit", 12)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for rank in range(world):
        b = source.batch(0, rank, world)
        _, losses = model(b.tokens, b.targets, positions=b.positions, doc_ids=b.doc_ids, token_losses=True)
        sums += sums_by_group(losses, b, 3)
    for k in range(3):
        of_task = mixture._take(samples, np.flatnonzero(groups == k))
        expected = brute_force(model, of_task, np.zeros(len(of_task)), "token", ())
        assert (sums[0, k] / sums[1, k]).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_step_of_tasks_without_weight_teaches_nothing(model):
    samples = random_samples(3, 1)
    source = source_of(samples, np.zeros(3, int), "task_token", "none", 3, (0.0, 1.0))
    assert loss_of_step(model, source, 0, 1, 0).item() == 0


# ---- which samples


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=2, max_size=4).filter(any),
    temperature=st.sampled_from([1.0, 1.5, 4.0, math.inf]),
)
def test_upsampling(sizes, temperature):
    parts = [random_samples(n, k) if n else Samples(*[np.empty(0)] * 2, np.zeros(1), {}) for k, n in enumerate(sizes)]
    samples, groups = mixture.join(parts, temperature)
    assert len(groups) == len(samples)
    assert len(samples.ids) == len(samples.mask) == samples.offsets[-1]
    for k, part in enumerate(parts):
        seen = [_text(samples, i) for i in np.flatnonzero(groups == k)]
        largest = max(sizes)
        assert len(seen) == (round(largest * (sizes[k] / largest) ** (1 / temperature)) if sizes[k] else 0)
        times = [sum(_text(part, i) == text for i in range(len(part))) for text in seen]
        for i in range(len(part)):  # as often as any other, or once more
            twins = times[seen.index(_text(part, i))]
            low, high = len(seen) // sizes[k], -(-len(seen) // sizes[k])
            assert low * twins <= seen.count(_text(part, i)) <= high * twins


def _text(samples: Samples, i: int) -> tuple:
    here = np.s_[int(samples.offsets[i]) : int(samples.offsets[i + 1])]
    return (*samples.ids[here].tolist(), *samples.mask[here].tolist())


def test_one_task_is_taken_as_it_is():
    part = random_samples(5, 0)
    assert mixture.join([part], temperature=3.0)[0] is part
    with pytest.raises(ValueError, match="temperature should be 1"):
        mixture.join([part, part], temperature=0.5)


def test_names_and_paths_of_tasks(tmp_path):
    for name in ("a", "b", "c,d"):
        (tmp_path / name).mkdir()
    given = [tmp_path / "c,d", *(tmp_path / f"{name}/train.jsonl" for name in "ab"), tmp_path / "poems.csv"]
    paths = split_paths([given[0], type(given[0])(f"{given[1]},{given[2]}"), given[3]])
    assert paths == given
    assert task_names(paths) == ["c,d", str(given[1]), str(given[2]), "poems"]
    with pytest.raises(ValueError, match="name each task once"):
        task_names([given[1], given[1]])


def test_data_is_a_list_of_tasks(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert DataArgs((a,)).tasks == [Task("a", a, None, 1.0)]
    assert DataArgs((a,), heldout=(b,)).tasks == [Task("a", a, b, 1.0)]
    both = type(a)(f"{a},{b}")
    assert DataArgs((both,), loss="task_token", weights=(2.0, 0.0)).tasks == [
        Task("a", a, None, 2.0),
        Task("b", b, None, 0.0),
    ]
    b.touch()
    assert [task.heldout for task in DataArgs((a, b), heldout=(b, b)).tasks] == [b, b]
    with pytest.raises(ValueError, match=f"--data should name each task once, found {a}, {a}"):
        DataArgs((a, a)).tasks  # noqa: B018

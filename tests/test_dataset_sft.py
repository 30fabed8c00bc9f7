"""Rows against samples one by one: in which company, how often."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from helpers.character_template import epoch_targets, targets_in_context
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.samples import Samples
from dataset import IGNORE
from dataset_sft import PACKINGS, PairData, SFTData, best_fit
from model import Transformer
from model_args import ModelArgs
from tuning.args import Packing


def samples_of(lengths: list[int], seed: int = 0) -> Samples:
    """Samples of these many ids, all of them different, a random half of each trained."""
    offsets = np.cumsum([0, *lengths]).astype(np.uint64)
    mask = np.random.default_rng(seed).random(sum(lengths)) < 0.5
    return Samples(np.arange(10, 10 + sum(lengths), dtype=np.int32), mask, offsets, {})


# --- samples -> rows


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 14), min_size=1, max_size=25),
    room=st.integers(0, 9),
    share=st.integers(1, 3),
    world=st.integers(1, 3),
    epoch=st.integers(0, 2),
    packing=st.sampled_from(["best_fit", "bucket", "none"]),
    shuffle=st.booleans(),
)
def test_packed_is_unpacked_and_every_sample_comes_once(lengths, room, share, world, epoch, packing, shuffle):
    samples = samples_of(lengths)
    data = SFTData(samples, max(lengths) - 1 + room, share * world, 3, packing, shuffle)
    assert epoch_targets(data, epoch, world) == targets_in_context(samples)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(2, 14), min_size=1, max_size=25), seq_len=st.integers(13, 30))
def test_a_row_is_samples_one_after_another(lengths, seq_len):
    samples = samples_of(lengths)
    data = SFTData(samples, seq_len, 2, 1)
    taken = 0
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        assert [x.dtype for x in (batch.tokens, batch.targets, batch.positions)] == [torch.int64] * 3
        assert batch.doc_ids.dtype == torch.int32 and batch.tokens.shape == (2, seq_len)
        for tokens, docs, targets in zip(batch.tokens, batch.doc_ids, batch.targets):
            used = int((docs >= 0).sum())
            taken += used
            numbers = docs[:used].tolist()
            assert numbers == sorted(numbers) and set(numbers) == set(range(len(set(numbers))))
            assert docs[used:].eq(-1).all() and targets[used:].eq(IGNORE).all()
            for doc in set(numbers):
                ids = tokens[docs == doc].tolist()
                assert ids == list(range(ids[0], ids[0] + len(ids)))  # one whole sample, without its last id
                assert ids[0] - 10 in samples.offsets and ids[-1] + 2 - 10 in samples.offsets
    assert taken == sum(lengths) - len(lengths)
    assert data.packing_efficiency == pytest.approx(taken / (data.n_rows * seq_len), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=20),
    seq_len=st.integers(1, 14),
    world=st.integers(1, 3),
    epoch=st.integers(0, 2),
    shuffle=st.booleans(),
)
def test_a_stream_loses_no_target_and_shows_each_what_its_row_holds_of_its_sample(
    lengths, seq_len, world, epoch, shuffle
):
    samples = samples_of(lengths)
    data = SFTData(samples, seq_len, 2 * world, 3, "concat", shuffle)
    found, whole = epoch_targets(data, epoch, world), targets_in_context(samples)
    assert sorted(target for _, target in found.elements()) == sorted(target for _, target in whole.elements())
    context = {target: before for before, target in whole}  # all ids are different
    for before, target in found:
        assert before and context[target][-len(before) :] == before
    assert data.n_rows == -(-(sum(lengths) - len(lengths)) // seq_len)  # nothing is padded but the last row
    assert data.packing_efficiency > 1 - 1 / data.n_rows


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40), rows=st.integers(1, 6), epoch=st.integers(0, 2))
def test_rows_by_length_are_as_wide_as_their_step_needs(lengths, rows, epoch):
    samples, taken = samples_of(lengths), 0
    data = SFTData(samples, 100, rows, 3, "bucket")
    longest = []
    for step in range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch):
        tokens = data.batch(step).tokens
        used = (tokens > 0).sum(1)
        taken += int(used.sum())
        assert tokens.shape[1] == min(100, -(-int(used.max()) // 16) * 16)
        longest.append(sorted((-(-used[used > 0] // 16)).tolist()))
    assert taken == sum(lengths) - len(lengths)
    whole = sorted(widths for widths in longest if len(widths) == rows)
    assert all(a[-1] <= b[0] for a, b in itertools.pairwise(whole))  # no step reaches into another's lengths


def test_padding_takes_less_by_length_and_best_fit_the_least():
    samples = samples_of(np.random.default_rng(0).integers(2, 100, 400).tolist())
    none, bucket, best_fit = (
        SFTData(samples, 128, 8, 0, packing).packing_efficiency for packing in ("none", "bucket", "best_fit")
    )
    assert none < 0.62 and 0.8 < bucket < best_fit  # 0.57, 0.86 and 0.99 in fact


@pytest.mark.parametrize(
    ("kind", "packing", "sha256"),
    [
        (SFTData, "best_fit", "ac220a80cc60dc38e6af9fe4e56b0137b8107a650e35ca54575d0014d6510553"),
        (SFTData, "concat", "7cbe2dcd8e3567bb5fca746c7b33e3c905db5d1853d6d33b028558c2cea1f3b5"),
        (SFTData, "bucket", "981fa6c0cfeb2bd802196ecc525086b2f58f1737ecefbb773f3517010280a185"),
        (SFTData, "none", "9a057df1c3b8c966cfcfad26f8536a398ad0e511efe21c361337174fdc6881c2"),
        (PairData, "best_fit", "6e9388be3d81b6d6021abc9c379d3c8f5650512b91005d61a79c35643c41d888"),
        (PairData, "none", "49913c7e02c2b7c08ddf516d9917baef4ee8018410cbeb067239aaf7650f767e"),
    ],
)
def test_batches_of_each_packing_are_what_they_were(kind, packing, sha256):
    """A change of these bytes is a change of every run: of its losses, and of what a checkpoint goes on with."""
    samples = samples_of(np.random.default_rng(5).integers(2, 40, 300).tolist())
    data, digest = kind(samples, 64, 4, 7, packing), hashlib.sha256()
    for step in range(3 * data.steps_per_epoch):
        for tensor in vars(data.batch(step)).values():
            if tensor is not None:
                digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == sha256


def test_the_flag_offers_the_packings_there_are():
    assert get_args(Packing) == tuple(PACKINGS) == SFTData.packings


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    packing=st.sampled_from(list(PACKINGS)),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_every_packer_divides_all_positions_among_rows_that_hold_them(sizes, packing, batch_size, seed):
    packer = PACKINGS[packing](np.array(sizes), 20, batch_size)
    rows, n_rows = packer.rows_of_epoch(np.random.default_rng(seed)), len(packer.rows_of_epoch(None).order)
    assert sorted(rows.order.tolist()) == list(range(n_rows))  # as many in every epoch
    pieces = [rows.row(number) for number in range(n_rows)]
    assert all(1 <= (row[:, 2] - row[:, 1]).sum() <= 20 and (packer.shares_rows or len(row) == 1) for row in pieces)
    positions = [(i, at) for i, first, last in np.concatenate(pieces).tolist() for at in range(first, last)]
    assert sorted(positions) == [(i, at) for i, size in enumerate(sizes) for at in range(size)]
    assert len(rows.row(-1)) == 0


@pytest.mark.parametrize("packing", ["best_fit", "concat", "bucket", "none"])
def test_groups_and_weights_lie_where_their_samples_do(packing):
    samples = samples_of(np.random.default_rng(1).integers(2, 20, 40).tolist())
    groups = np.arange(40) % 3
    data = SFTData(samples, 24, 4, 3, packing, groups=groups, per_sample=True)
    owner = np.repeat(np.arange(40), np.diff(samples.offsets.astype(int)))  # of each id; ids count up from 10
    n_targets = np.bincount(owner, samples.mask)
    n_targets -= samples.mask[samples.offsets[:-1].astype(int)]  # nothing precedes the first id
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        trained = batch.targets != IGNORE
        sample = owner[batch.targets[trained].numpy() - 10]
        assert batch.groups[trained].tolist() == groups[sample].tolist()
        assert batch.loss_weights[trained].tolist() == pytest.approx((1 / n_targets[sample]).tolist(), rel=1e-6)


@pytest.mark.parametrize("packing", ["best_fit", "concat", "bucket", "none"])
@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_split_the_rows_of_a_single_process(world, packing):
    samples = samples_of(np.random.default_rng(0).integers(2, 20, 77).tolist())
    data = SFTData(samples, 24, 6, 3, packing, groups=np.arange(77) % 2, per_sample=True)
    for step in range(2 * data.steps_per_epoch):
        whole = data.batch(step)
        for rank in range(world):
            part = data.batch(step, rank, world)
            for name in ("tokens", "targets", "positions", "doc_ids", "loss_weights", "groups"):
                if getattr(whole, name) is not None:
                    assert torch.equal(getattr(part, name), getattr(whole, name)[rank::world])
    with pytest.raises(ValueError, match="batch_size 6 does not divide over 4 processes"):
        data.batch(0, 0, 4)


def test_a_batch_depends_on_nothing_but_seed_and_step():
    samples = samples_of(np.random.default_rng(0).integers(2, 20, 50).tolist())
    data = SFTData(samples, 24, 4, 3)
    expected = [data.batch(step).tokens for step in range(3 * data.steps_per_epoch)]
    fresh = pickle.loads(pickle.dumps(SFTData(samples, 24, 4, 3)))
    for step in torch.randperm(len(expected)).tolist():
        np.random.seed(step)  # the global generator must not matter
        assert torch.equal(fresh.batch(step).tokens, expected[step])


def test_company_and_order_differ_by_epoch_and_seed_unless_not_shuffled():
    samples = samples_of(np.random.default_rng(0).integers(2, 12, 120).tolist())

    def rows(data: SFTData, epoch: int) -> list[list[int]]:
        steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
        return [row for step in steps for row in data.batch(step).tokens.tolist()]

    data = SFTData(samples, 20, 4, 3)
    assert rows(data, 0) != rows(data, 1) != rows(SFTData(samples, 20, 4, 4), 1)
    common = {tuple(row) for row in rows(data, 0)} & {tuple(row) for row in rows(data, 1)}
    assert len(common) < data.n_rows / 2  # not the same rows in another order
    fixed = SFTData(samples, 20, 4, 3, shuffle=False)
    assert rows(fixed, 0) == rows(fixed, 1)
    one_each = SFTData(samples, 20, 4, 3, "none", shuffle=False)
    assert [row[0] for row in rows(one_each, 0)][:120] == (samples.offsets[:-1].astype(int) + 10).tolist()
    assert one_each.n_rows == 120 and one_each.batch(0).doc_ids is None and one_each.batch(0).positions is None


def test_rows_that_fill_the_last_step_have_no_target():
    data = SFTData(samples_of([5, 5, 5]), 4, 2, 0)
    last = data.batch(1)
    assert data.steps_per_epoch == 2 and last.tokens.shape == (2, 4)
    assert last.doc_ids.tolist() == [[0] * 4, [-1] * 4] and last.targets[1].tolist() == [IGNORE] * 4


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), max_size=40), room=st.integers(0, 10))
def test_best_fit_takes_the_row_with_the_least_space_that_holds(sizes, room):
    sizes, capacity = sorted(sizes, reverse=True), 30 + room
    used: list[int] = []
    for size, row in zip(sizes, best_fit(np.array(sizes, int), capacity).tolist()):
        fitting = [capacity - u for u in used if capacity - u >= size]
        if fitting:
            assert capacity - used[row] == min(fitting)
            used[row] += size
        else:
            assert row == len(used)
            used.append(size)


def test_packing_wastes_little_of_short_samples():
    lengths = np.random.default_rng(0).integers(10, 100, 2000).tolist()
    packed, loose = (
        SFTData(samples_of(lengths), 128, 8, 0, packing).packing_efficiency for packing in ("best_fit", "none")
    )
    assert packed > 0.98 and loose < 0.6  # 0.996 and 0.563 in fact


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"packing": "greedy"}, "best_fit, concat, bucket, none, found 'greedy'"),
        ({"seq_len": 4}, "2 to 5 ids with seq_len 4, found 2 to 6; encode them with the same seq_len"),
        ({"samples": samples_of([1, 3])}, "found 1 to 3"),
        ({"samples": samples_of([])}, "expected samples to train on, found none"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"groups": np.zeros(3, int)}, "a group for each of the 2 samples, found 3"),
    ],
)
def test_options_without_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SFTData(**({"samples": samples_of([6, 2]), "seq_len": 5, "batch_size": 2, "seed": 0} | options))


def test_the_loss_of_packed_rows_is_the_loss_of_samples_alone():
    model = Transformer(
        ModelArgs(dim=16, n_layers=2, n_heads=2, vocab_size=300, multiple_of=8, max_seq_len=32)
    ).double()
    samples = samples_of(np.random.default_rng(0).integers(2, 16, 20).tolist())
    loss = dict.fromkeys(("best_fit", "none"), 0.0)
    for packing in loss:
        data = SFTData(samples, 32, 4, 0, packing)
        for step in range(data.steps_per_epoch):
            batch = data.batch(step)
            total, count = model(batch.tokens, batch.targets, positions=batch.positions, doc_ids=batch.doc_ids)
            assert count == batch.n_targets
            loss[packing] += total.item()
    assert loss["best_fit"] == pytest.approx(loss["none"], rel=1e-6)  # the loss itself is summed in float32

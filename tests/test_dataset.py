"""Batches against lists built the slow way: what an epoch must contain, whoever asks for it in whatever order."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bins.token_bin import BinWriter, TokenBin
from dataset import IGNORE, Batch, PretrainData

EOS = 0


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bins")


def numbered_bins(folder: Path, sizes: list[int]) -> list[TokenBin]:
    """Headerless bins in which every token of all of them has an id of its own: 1, 2, 3, ..."""
    bins, first = [], 1
    for i, size in enumerate(sizes):
        path = folder / f"numbered_{i}_{first}_{size}.bin"
        np.arange(first, first + size, dtype="<u2").tofile(path)
        bins.append(TokenBin(path))
        first += size
    return bins


def document_bin(folder: Path, lengths: list[int]) -> TokenBin:
    """A bin whose document d is the id d + 1, `lengths[d]` times, and eos."""
    with BinWriter(folder / "documents", vocab_size=len(lengths) + 1, eos_id=EOS, tokenizer_sha256="") as writer:
        for d, length in enumerate(lengths):
            writer.add([d + 1] * length + [EOS])
    return TokenBin(folder / "documents.bin")


def epoch_rows(data: PretrainData, epoch: int = 0, world: int = 1) -> list[tuple[list[int], list[int]]]:
    """(tokens, targets) of every row of an epoch, all ranks, in the order of the steps."""
    rows = []
    for step in range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch):
        for rank in range(world):
            batch = data.batch(step, rank, world)
            rows += zip(batch.tokens.tolist(), batch.targets.tolist())
    return rows


def targets_of(rows: list[tuple[list[int], list[int]]]) -> Counter:
    return Counter(y for _, targets in rows for y in targets if y != IGNORE)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(any),
    seq_len=st.integers(1, 17),
    share=st.integers(1, 4),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_every_token_is_a_target_exactly_once_an_epoch(folder, sizes, seq_len, share, world, epoch, shuffle):
    bins = numbered_bins(folder, sizes)
    data = PretrainData(bins, seq_len, share * world, seed=7, shuffle=shuffle, headerless_eos_id=EOS)
    rows = epoch_rows(data, epoch, world)
    assert targets_of(rows) == Counter(range(1, sum(sizes) + 1))
    firsts = {1 + sum(sizes[:i]) for i in range(len(sizes))}  # the first token of each bin follows an eos
    for tokens, targets in rows:
        assert len(tokens) == len(targets) == seq_len
        for x, y in zip(tokens, targets):
            if y != IGNORE:
                assert x == (EOS if y in firsts else y - 1)
    assert len(rows) == data.steps_per_epoch * share * world
    assert len(rows) - sum(-(-size // seq_len) for size in sizes) < share * world  # no step of nothing but filling


def test_a_row_is_a_stretch_of_the_stream_and_the_last_one_is_filled_up(folder):
    data = PretrainData(numbered_bins(folder, [7]), 3, 2, seed=0, shuffle=False, headerless_eos_id=EOS)
    assert data.steps_per_epoch == 2
    first, last = data.batch(0), data.batch(1)
    assert first.tokens.tolist() == [[EOS, 1, 2], [3, 4, 5]]
    assert first.targets.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert last.tokens.tolist() == [[6, 7, EOS], [EOS, EOS, EOS]]
    assert last.targets.tolist() == [[7, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE]]
    assert (first.n_targets, last.n_targets) == (6, 1)
    assert first.positions is None and first.doc_ids is None and first.loss_weights is None
    assert first.tokens.dtype == first.targets.dtype == torch.int64


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_split_the_rows_of_a_single_process(folder, world):
    data = PretrainData(numbered_bins(folder, [50, 31]), 4, 6, seed=3)
    for step in range(2 * data.steps_per_epoch):
        whole = data.batch(step)
        for rank in range(world):
            part = data.batch(step, rank, world)
            assert torch.equal(part.tokens, whole.tokens[rank::world])
            assert torch.equal(part.targets, whole.targets[rank::world])


def test_a_batch_depends_on_nothing_but_seed_step_and_rank(folder):
    bins = numbered_bins(folder, [90, 40])
    data = PretrainData(bins, 5, 4, seed=1, weights=[1, 0.5])
    expected = [data.batch(step, 1, 2).targets for step in range(3 * data.steps_per_epoch)]
    fresh = pickle.loads(pickle.dumps(PretrainData(bins, 5, 4, seed=1, weights=[1, 0.5])))
    for step in torch.randperm(len(expected)).tolist():
        np.random.seed(step)  # the global generator must not matter
        assert torch.equal(fresh.batch(step, 1, 2).targets, expected[step])


def test_order_differs_by_epoch_and_seed_unless_not_shuffled(folder):
    bins = numbered_bins(folder, [300])
    data = PretrainData(bins, 3, 10, seed=1)
    assert epoch_rows(data, 0) != epoch_rows(data, 1)
    assert epoch_rows(data, 0) != epoch_rows(PretrainData(bins, 3, 10, seed=2), 0)
    in_order = PretrainData(bins, 3, 10, seed=1, shuffle=False)
    targets = [y for _, row in epoch_rows(in_order, 1) for y in row]
    assert targets == list(range(1, 301))


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0, 0.25, 0.3, 0.5, 1, 1.5, 2, 3]), min_size=2, max_size=2).filter(any),
    epochs=st.integers(1, 5),
    shuffle=st.booleans(),
)
def test_weights_are_visits_an_epoch_spread_evenly(folder, weights, epochs, shuffle):
    sizes, seq_len = [60, 33], 3  # 20 and 11 whole windows
    data = PretrainData(numbered_bins(folder, sizes), seq_len, 4, seed=5, weights=weights, shuffle=shuffle)
    count = Counter()
    for epoch in range(epochs):
        count += targets_of(epoch_rows(data, epoch))
    for weight, size, first in zip(weights, sizes, (1, 61)):
        of_bin = [count[y] for y in range(first, first + size)]
        assert sum(of_bin) == epochs * round(weight * size / seq_len) * seq_len
        assert max(of_bin) - min(of_bin) <= 1


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    seq_len=st.integers(1, 9),
    headerless=st.booleans(),
)
def test_isolated_documents_are_numbered_and_restart(folder, lengths, seq_len, headerless):
    bin = document_bin(folder, lengths)
    if headerless:
        bin.path.with_name("plain.bin").write_bytes(bin.path.read_bytes())
        bin = TokenBin(bin.path.with_name("plain.bin"))
    data = PretrainData([bin], seq_len, 2, 0, shuffle=False, isolate_documents=True, headerless_eos_id=EOS)
    document = [d for d, length in enumerate(lengths) for _ in range(length + 1)]  # of each token of the stream
    stream = [token for d, length in enumerate(lengths) for token in [d + 1] * length + [EOS]]
    at = 0
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        assert (batch.positions.dtype, batch.doc_ids.dtype) == (torch.int64, torch.int32)
        for row in range(2):
            known = min(seq_len, len(stream) - at)
            here = document[at : at + known]
            ids = batch.doc_ids[row].tolist()
            assert batch.targets[row].tolist() == stream[at : at + known] + [IGNORE] * (seq_len - known)
            assert ids[known:] == [-1] * (seq_len - known) and min(ids[:known], default=0) >= 0
            assert [id - ids[0] for id in ids[:known]] == [d - here[0] for d in here]
            assert batch.positions[row].tolist()[:known] == [here[:t].count(here[t]) for t in range(known)]
            # The input of a document's first token is the eos before it, and belongs to that document alone.
            begins = [t for t in range(known) if batch.positions[row, t] == 0 and (t or document[at - 1] != here[0])]
            assert all(batch.tokens[row, t] == EOS for t in begins)
            at += known
    assert at == len(stream)


def test_micro_batches_are_views_and_cover_the_batch(folder):
    data = PretrainData([document_bin(folder, [4, 3, 9, 1])], 4, 6, 0, isolate_documents=True)
    batch = data.batch(0)
    parts = batch.split(4)
    assert [len(part) for part in batch.split(0)] == [6] and [len(part) for part in batch.split(9)] == [6]
    assert [len(part) for part in parts] == [4, 2] and len(batch) == 6
    assert sum(part.n_targets for part in parts) == batch.n_targets
    assert torch.equal(torch.cat([part.doc_ids for part in parts]), batch.doc_ids)
    assert parts[0].tokens.data_ptr() == batch.tokens.data_ptr() and parts[0].loss_weights is None
    moved = Batch(batch.tokens, batch.targets).to("meta")
    assert moved.tokens.device.type == "meta" and moved.positions is None


def test_wide_ids_survive(folder):
    with BinWriter(folder / "wide", vocab_size=70_001, eos_id=70_000, tokenizer_sha256="") as writer:
        writer.add([65_536, 69_999, 70_000])
    data = PretrainData([TokenBin(folder / "wide.bin")], 3, 1, 0)
    assert data.batch(0).tokens.tolist() == [[70_000, 65_536, 69_999]]  # the bin's own eos, not headerless_eos_id
    assert data.batch(0).targets.tolist() == [[65_536, 69_999, 70_000]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weights": [1.0]}, "one weight for each of the 2 bins, found 1"),
        ({"weights": [1, -0.5]}, "not negative"),
        ({"weights": [1, float("nan")]}, "finite"),
        ({"weights": [0, 0]}, "no token to train on"),
        ({"seq_len": 0}, "seq_len >= 1"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_options_without_sense_are_refused(folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PretrainData(numbered_bins(folder, [9, 5]), **({"seq_len": 3, "batch_size": 2, "seed": 0} | options))


def test_an_empty_corpus_and_an_uneven_world_are_refused(folder):
    with pytest.raises(ValueError, match="no token to train on"):
        PretrainData(numbered_bins(folder, [0]), 3, 2, 0)
    data = PretrainData(numbered_bins(folder, [9]), 3, 2, 0)
    with pytest.raises(ValueError, match="batch_size 2 does not divide over 3 processes: use a multiple of 3"):
        data.batch(0, 0, 3)
    with pytest.raises(ValueError, match="rank 2 is outside the world of 2"):
        data.batch(0, 2, 2)

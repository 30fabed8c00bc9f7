"""Rows of several sources in shares, and the ledger of what was read, against counts of the batches themselves."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bins.token_bin import BinWriter, TokenBin
from dataset import IGNORE, MixedData, PretrainData


def numbered(path: Path, first: int, lengths: list[int], names: list[str]) -> TokenBin:
    """A bin whose tokens are first, first + 1, ...; document d has lengths[d] of them, and is from names[d]."""
    total = sum(lengths)
    # the last id of each document has to be eos: written with one id for all, then replaced in the file
    with BinWriter(path, vocab_size=60_000, eos_id=0, tokenizer_sha256="") as writer:
        for length, name in zip(lengths, names):
            writer.add([1] * (length - 1) + [0], name)
    np.arange(first, first + total, dtype="<u2").tofile(path.with_suffix(".bin"))
    return TokenBin(path.with_suffix(".bin"))


def source_of(bins: list[TokenBin]) -> dict[int, tuple[str, str]]:
    """token -> (path of its bin, source), found document by document."""
    found, first = {}, 1
    for bin in bins:
        at = first
        for name, documents in bin.meta["runs"]:
            for _ in range(documents):
                d = next(d for d, start in enumerate(bin.offsets.tolist()) if start == at - first)
                for _ in range(int(bin.offsets[d + 1] - bin.offsets[d])):
                    found[at] = (str(bin.path), name)
                    at += 1
        first = at
    return found


def targets(data: PretrainData, steps: list[int]) -> Counter:
    return Counter(y for step in steps for row in data.batch(step).targets.tolist() for y in row if y != IGNORE)


documents = st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["a", "b", "c"])), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    docs=st.lists(documents, min_size=1, max_size=3),
    seq_len=st.integers(1, 7),
    steps=st.integers(0, 25),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1, 1.5, 2]), min_size=3, max_size=3),
    left_out=st.sets(st.integers(0, 30)),
    mixed=st.booleans(),
)
def test_the_ledger_is_what_the_batches_have_held(tmp_path_factory, docs, seq_len, steps, weights, left_out, mixed):
    folder, bins, first = tmp_path_factory.mktemp("bins"), [], 1
    for i, each in enumerate(docs):
        bins.append(numbered(folder / f"b{i}", first, [n for n, _ in each], [name for _, name in each]))
        first += len(bins[-1])
    weights = weights[: len(bins)]
    if mixed:
        data = MixedData([[bin] for bin in bins], [(0, weights), (9, weights[::-1])], seq_len, 3, seed=2)
    elif any(round(w * -(-len(bin) // seq_len)) for w, bin in zip(weights, bins)):
        data = PretrainData(bins, seq_len, 3, seed=2, weights=weights)
    else:
        return
    owner, expected = source_of(bins), Counter()
    for token, times in targets(data, [s for s in range(steps) if s not in left_out]).items():
        expected[owner[token]] += times
    ledger, found = data.ledger(steps, left_out), Counter()
    for row in ledger:
        found[row["bin"], row["source"]] += row["read"]
    assert +found == expected
    assert sum(row["tokens"] for row in ledger) == sum(map(len, bins))


def test_rows_come_in_shares_and_each_source_is_read_whole_before_it_is_read_again(tmp_path):
    bins = [numbered(tmp_path / "a", 1, [40, 20], ["a", "a"]), numbered(tmp_path / "b", 61, [30], ["b"])]
    bins.append(numbered(tmp_path / "c", 91, [90], ["c"]))
    data = MixedData([bins[:2], bins[2:]], [(0, (0.75, 0.25)), (10, (0, 1))], seq_len=3, batch_size=8, seed=1)
    first, later = targets(data, list(range(10))), targets(data, list(range(10, 20)))
    assert sum(n for y, n in first.items() if y <= 90) == 10 * 8 * 3 * 0.75
    assert {n for y, n in first.items() if y <= 90} == {2}  # 60 rows of 30 windows
    assert min(later) > 90
    both = targets(data, list(range(20)))
    assert max(both[y] for y in range(91, 181)) - min(both[y] for y in range(91, 181)) <= 1
    assert data.steps_per_epoch == -(-60 // 8)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_split_the_rows_of_a_mixture(tmp_path, world):
    bins = [numbered(tmp_path / "a", 1, [70], ["a"]), numbered(tmp_path / "b", 71, [50], ["b"])]
    data = MixedData([[bins[0]], [bins[1]]], [(0, (0.3, 0.7))], seq_len=4, batch_size=8, seed=1)
    for step in (0, 7, 3):
        whole = data.batch(step).tokens
        for rank in range(world):
            assert data.batch(step, rank, world).tokens.equal(whole[rank::world])
            assert len(data.origins(step, rank, world)) == 8 // world


def test_bins_that_do_not_say_where_their_sources_lie_are_one_stretch(tmp_path):
    bin = numbered(tmp_path / "a", 1, [4, 5], ["x", "y"])
    assert bin.parts() == [("x", 0, 4), ("y", 4, 9)]
    del bin.meta["runs"]
    assert bin.parts() == [("x, y", 0, 9)]
    np.arange(5, dtype="<u2").tofile(tmp_path / "plain.bin")
    assert TokenBin(tmp_path / "plain.bin").parts() == [("plain.bin", 0, 5)]

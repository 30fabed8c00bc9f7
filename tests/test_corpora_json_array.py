"""corpora/json_array.py against json itself: the same elements, whatever the size of the window."""

import io
import json
import tracemalloc
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import json_array
from corpora.json_array import Malformed, elements

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SPACE = st.text(alphabet=" \t\n\r", max_size=3)
MALFORMED = ['{"text": oops}', '{"text" 1}', "{'text': 1}", '{"text": 1,}', '{"text": "a" "b"}', '{"text": tru}']


def with_window(text: str, chunk: int) -> list:
    with mock.patch.object(json_array, "CHUNK", chunk):
        return list(elements(io.StringIO(text)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(SPACE, VALUES, SPACE), max_size=8), st.integers(1, 40), st.booleans())
def test_elements_are_those_of_json_with_their_lines(parts, chunk, ascii_only):
    text, lines = "[", []
    for i, (before, value, after) in enumerate(parts):
        text += ("," if i else "") + before
        lines.append(1 + text.count("\n"))
        text += json.dumps(value, ensure_ascii=ascii_only) + after
    text += "]"
    found = with_window(text, chunk)
    assert [value for _, value in found] == json.loads(text) == [value for _, value, _ in parts]
    assert [line for line, _ in found] == lines


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("malformed", MALFORMED)
def test_a_malformed_element_is_reported_and_its_neighbours_survive(malformed, chunk):
    good = [{"text": f"第{i}篇"} for i in range(4)]
    pieces = [json.dumps(value, ensure_ascii=False) for value in good]
    pieces.insert(2, malformed)
    found = with_window("[" + ",\n".join(pieces) + "]", chunk)
    assert [value for _, value in found if not isinstance(value, Malformed)] == good
    (bad,) = [(line, value) for line, value in found if isinstance(value, Malformed)]
    assert bad[0] == 3
    assert bad[1].raw[:1] == malformed[:1]


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize(
    ("text", "good", "reasons"),
    [
        ('[{"a": 1}, {"a": ', [{"a": 1}], ["not JSON", "ends before its array is closed"]),
        ('[{"a": 1}', [{"a": 1}], ["ends before its array is closed"]),
        ("[", [], ["ends before its array is closed"]),
        ('[{"a": 1}] rest', [{"a": 1}], ["text after the end"]),
        ('[{"a": 1}] {"b": 2}, {"a": 3}]', [{"a": 1}, {"a": 3}], ["text after the end"]),
        ("[]", [], []),
        (" \n[ ]\n ", [], []),
    ],
)
def test_nothing_is_lost_in_silence(text, good, reasons, chunk):
    found = [value for _, value in with_window(text, chunk)]
    assert [value for value in found if not isinstance(value, Malformed)] == good
    malformed = [value for value in found if isinstance(value, Malformed)]
    assert len(malformed) == len(reasons)
    assert all(reason in value.reason for value, reason in zip(malformed, reasons))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='[]{}",:\\ 1e+-.tru\n甲', max_size=40), st.integers(1, 10))
def test_any_text_comes_to_an_end_without_an_exception(text, chunk):
    text = "[" + text
    found = [value for _, value in with_window(text, chunk)]
    try:
        expected = json.loads(text)
    except ValueError:
        return
    assert found == expected


def test_an_element_beyond_the_limit_is_refused_and_the_next_is_read():
    text = json.dumps([{"text": "a"}, {"text": "b" * 5000}, {"text": "c"}])
    with mock.patch.object(json_array, "MAX_CHARS", 1000):
        found = [value for _, value in with_window(text, 64)]
    assert found[0] == {"text": "a"} and found[2:] == [{"text": "c"}]
    assert "longer than 1000 characters" in found[1].reason
    assert len(found[1].raw) <= 64


def test_nesting_too_deep_for_the_decoder_is_malformed():
    found = [value for _, value in with_window("[" + "[" * 100_000 + "]" * 100_000 + "]", 1 << 20)]
    assert found and all(isinstance(value, Malformed) for value in found)


def test_memory_does_not_grow_with_the_array():
    def peak(count: int) -> int:
        text = io.StringIO("[" + ",".join(['{"text": "' + "长" * 90 + '"}'] * count) + "]")
        with mock.patch.object(json_array, "CHUNK", 4096):
            tracemalloc.start()
            assert sum(1 for _ in elements(text)) == count
            size = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return size

    # Four windows' worth of slack against an array of 2 MB: Python's strings take up to 4 bytes a character.
    assert peak(20_000) < peak(200) + 4 * 4 * 4096


def test_not_an_array():
    with pytest.raises(ValueError, match="expected a JSON array"):
        list(elements(io.StringIO('{"a": 1}')))

"""Lines of JSON of anything that was read, against what json reads back."""

import json
from datetime import date

from hypothesis import given, settings
from hypothesis import strategies as st

from files import json_line, write_json_lines

ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=5)  # lone surrogates, too
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(value=st.dictionaries(ANY_TEXT, VALUES, max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_line_is_what_json_reads_back(value):
    line = json_line(value)
    expected = json.loads(json.dumps(value))  # joins two halves of a character, as the line does
    assert line.endswith(b"\n") and line.count(b"\n") == 1 and json.loads(line) == expected


def test_values_that_json_does_not_know_are_written_as_text(tmp_path):
    circle: list = []
    circle.append(circle)
    odd = [
        {(1, 2): "a"},
        {"a": circle},
        {"when": date(2026, 1, 2), "raw": b"x"},
        {"n": float("nan"), "i": float("-inf")},
    ]
    write_json_lines(tmp_path / "a.jsonl", odd)
    tuples, around, dates, numbers = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert tuples == {"(1, 2)": "a"} and around == {"a": "[[...]]"} and dates == {"when": "2026-01-02", "raw": "b'x'"}
    assert numbers["n"] != numbers["n"] and numbers["i"] == float("-inf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

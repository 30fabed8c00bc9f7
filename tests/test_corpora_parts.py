"""corpora/parts.py: parts of a long text, which together are the text."""

from hypothesis import given
from hypothesis import strategies as st

from corpora.parts import in_parts, parts
from corpora.registry import BadRecord, Document


@given(st.text("a月 .。\n", max_size=300), st.integers(1, 40))
def test_parts_join_to_the_text_and_are_not_short(text, size):
    found = list(parts(text, size))
    assert "".join(found) == text and max(map(len, found)) <= size
    assert len(found) == 1 or min(map(len, found)) >= size // 4


def test_cuts_lie_at_the_end_of_a_paragraph_then_of_a_line_then_of_a_sentence():
    assert list(parts("一" * 7 + "\n\n" + "二" * 3 + "\n" + "三" * 5, 10)) == [
        "一" * 7 + "\n\n",
        "二" * 3 + "\n" + "三" * 5,
    ]
    assert list(parts("一" * 8 + "。" + "二" * 9, 12)) == ["一" * 8 + "。", "二" * 9]


def test_a_short_document_and_a_bad_record_stay_as_they_are():
    items = [Document("x" * 10, "a", True), BadRecord("a:1", "why", ""), Document("y" * 20, "a", True)]
    assert list(in_parts(items, 10)) == [*items[:2], *[Document("y" * 10, "a", True)] * 2]
    assert list(in_parts(items, 0)) == items

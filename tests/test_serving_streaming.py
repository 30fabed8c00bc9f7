"""Text as it may be shown: whole characters, and nothing of a stop string."""

import itertools

import pytest
from helpers.small_model import ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.streaming import StopStrings, text_pieces


@given(st.text(max_size=30), st.integers(0, 3))
@settings(deadline=None)
def test_text_pieces_are_whole_characters(text, cut):
    ids = [300, *text.encode(), 301]
    pieces = list(text_pieces(ByteTokenizer(), ids))
    assert "".join(pieces) == text
    assert all(len(piece) == 1 for piece in pieces)
    torn = text.encode()[: len(text.encode()) - cut]
    assert "".join(text_pieces(ByteTokenizer(), torn)) == torn.decode("utf8", errors="replace")


def test_text_pieces_come_as_soon_as_they_are_complete():
    fed = []
    pieces = text_pieces(ByteTokenizer(), (fed.append(i) or i for i in "a诗b".encode()))
    assert (next(pieces), len(fed)) == ("a", 1)
    assert (next(pieces), len(fed)) == ("诗", 4)


# ---- stop strings


class PieceTokenizer:
    """Ids are places in a list of pieces of any bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def id_to_bytes(self, i: int) -> bytes:
        return self.pieces[i]


def cut_anywhere(text: bytes, places: list[int]) -> list[bytes]:
    borders = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def before_first(text: bytes, stops: list[bytes]) -> bytes:
    """What stands before the stop that is complete first, byte by byte; of several the longest."""
    for n in range(len(text) + 1):
        found = [stop for stop in stops if text[:n].endswith(stop)]
        if found:
            return text[: n - max(map(len, found))]
    return text


texts = st.text("ab江上", max_size=14)
stop_lists = st.lists(st.text("ab江上", min_size=1, max_size=4), max_size=3)


@given(texts, st.lists(st.integers(0, 60), max_size=30), stop_lists)
@settings(max_examples=400, deadline=None)
def test_a_stop_string_ends_the_text_wherever_the_tokens_are_cut(text, places, strings):
    pieces = cut_anywhere(text.encode(), places)
    tokenizer, stops = PieceTokenizer(pieces), [string.encode() for string in strings]
    stop, fed = StopStrings(tokenizer, strings), []
    expected = before_first(text.encode(), stops).decode()
    said, stream = "", text_pieces(tokenizer, (fed.append(i) or i for i in range(len(pieces))), stop)
    for piece in stream:
        said += piece
        assert piece and expected.startswith(said)
        unsaid = b"".join(pieces[: len(fed)]).removeprefix(said.encode())
        if not any(stop in unsaid for stop in stops):
            # held back is half a character, or what may be the beginning of a stop string
            begins = [unsaid.startswith(s[:n]) and len(unsaid) == n for s in stops for n in range(len(s))]
            assert any(begins) or unsaid.decode(errors="ignore") == ""
    assert said == expected == stop.before(text)
    ended = [n for n in range(1, len(pieces) + 1) if stop.ended(list(range(n)))]
    if said == text:
        assert ended == []
    else:
        assert len(fed) == ended[0]  # nothing is asked for once a stop string is complete


def test_half_a_character_before_a_stop_string():
    tokenizer = ByteTokenizer()
    ids = [300, *"低".encode(), 0xE6, 0x98, *"明月".encode(), *b"never"]  # two bytes of three, then a whole one
    assert "".join(text_pieces(tokenizer, ids, StopStrings(tokenizer, ["明月"]))) == "低\ufffd"


def test_a_text_that_only_begins_like_a_stop_string_is_said_at_the_end():
    tokenizer = ByteTokenizer()
    assert list(text_pieces(tokenizer, b"Q: a\nQ", StopStrings(tokenizer, ["\nQ:"])))[-2:] == ["a", "\nQ"]


def test_without_stop_strings_nothing_ends_and_an_empty_one_is_refused():
    tokenizer = ByteTokenizer()
    stop = StopStrings(tokenizer)
    assert not stop.ended([1, 2, 3]) and stop.before("abc") == "abc"
    assert not StopStrings(tokenizer, ["a"]).ended([])
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(tokenizer, ["a", ""])

"""The four strict forms of short Chinese verse: write a poem as text, split a text, find its form.

The name of its rhyme may stand in brackets before a verse, in a line of its own: `【七阳】`. It is no part of the form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from corpora.registry import stable_share

forms: dict[str, tuple[int, int]] = {"五言绝句": (4, 5), "七言绝句": (4, 7), "五言律诗": (8, 5), "七言律诗": (8, 7)}
"""Form -> (number of lines, characters per line)."""

HELD_OUT_TITLES, HELD_OUT_AUTHORS = 0.02, 0.01

_HAN = r"〇\u3400-\u9fff\U00020000-\U0003ffff"
_NAME = re.compile(f"[{_HAN}]+")
_TITLE = re.compile(f"[{_HAN}、，。：·]+")
_STOP = r"[，。！？；：、,.!?;:\s]"
_NUMERAL = "[一二三四五六七八九十百零〇○]+"
_RHYME = re.compile(rf"\s*【[{_HAN}]+】\n")
_PATTERNS = {
    form: re.compile(f"{_STOP}*(?:[{_HAN}]{{{chars}}}{_STOP}+){{{lines - 1}}}[{_HAN}]{{{chars}}}{_STOP}*")
    for form, (lines, chars) in forms.items()
}


class Poem(NamedTuple):
    """A poem in one of the `forms`; `lines` have no punctuation."""

    title: str
    author: str
    form: str
    lines: tuple[str, ...]
    rhyme: str = ""
    """The name of its rhyme, which then stands before the verse; see corpora/prosody.py."""

    @property
    def held_out(self) -> bool:
        """Whether the poem is held out: 2 % of the titles and 1 % of the authors are, by their hashes."""
        return (
            stable_share(f"title:{self.title}") < HELD_OUT_TITLES
            or stable_share(f"author:{self.author}") < HELD_OUT_AUTHORS
        )

    @property
    def text(self) -> str:
        """The verse without title and author, as written by `verse`, behind the name of the rhyme if it is known."""
        return (f"【{self.rhyme}】\n" if self.rhyme else "") + verse(self.lines)


def verse(lines: Iterable[str]) -> str:
    """Return the lines of a poem as text, two of them per text line: `床前明月光，疑是地上霜。`"""
    lines = list(lines)
    return "\n".join(f"{a}，{b}。" for a, b in zip(lines[::2], lines[1::2]))


def split_lines(text: str) -> list[str]:
    """Return the lines of a verse without punctuation: the inverse of `verse`, for any punctuation marks."""
    return [line for line in re.split(f"{_STOP}+", _without_rhyme(text)) if line]


def _without_rhyme(text: str) -> str:
    named = _RHYME.match(text)
    return text[named.end() :] if named else text


def form_of(text: str) -> str | None:
    """Return the form of a verse by its number of lines and characters; the name of its rhyme may stand before it.

    None if it is none of the `forms`, or contains a gap or a note.
    """
    text = _without_rhyme(text)
    return next((form for form, pattern in _PATTERNS.items() if pattern.fullmatch(text)), None)


def is_name(author: str) -> bool:
    """Return whether an author's name is one name, without a gap, a note or a second name."""
    return _NAME.fullmatch(author) is not None


def clean_title(title: str) -> str:
    """Return a title as people say it, or "" if nothing of it is left.

    Keeps the last part of a title such as `相和歌辞 关山月`. Removes the number in a series (`秋兴八首 一`,
    `杂诗  其三`), notes in parentheses, and editors' brackets.
    """
    title = re.sub(r"[（(〔].*?[）)〕]", "", title)
    title = re.sub(r"[\[\]〖〗《》「」『』〈〉“”]", "", title)
    parts = [part for part in title.split() if not re.fullmatch(f"其?{_NUMERAL}", part)]
    name = parts[-1] if parts else ""
    name = re.sub(f"{_NUMERAL}(首|绝句?)$", "", name) or name
    return name if _TITLE.fullmatch(name) and name != "句" else ""

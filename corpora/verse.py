"""The four strict forms of short Chinese verse: writing them down, reading them back, telling which one it is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from corpora.registry import stable_share

forms: dict[str, tuple[int, int]] = {"五言绝句": (4, 5), "七言绝句": (4, 7), "五言律诗": (8, 5), "七言律诗": (8, 7)}
"""Form -> (lines, characters a line)."""

HELD_OUT_TITLES, HELD_OUT_AUTHORS = 0.02, 0.01

_HAN = r"〇\u3400-\u9fff\U00020000-\U0003ffff"
_NAME = re.compile(f"[{_HAN}]+")
_TITLE = re.compile(f"[{_HAN}、，。：·]+")
_STOP = r"[，。！？；：、,.!?;:\s]"
_NUMERAL = "[一二三四五六七八九十百零〇○]+"
_PATTERNS = {
    form: re.compile(f"{_STOP}*(?:[{_HAN}]{{{chars}}}{_STOP}+){{{lines - 1}}}[{_HAN}]{{{chars}}}{_STOP}*")
    for form, (lines, chars) in forms.items()
}


class Poem(NamedTuple):
    """One poem in one of the `forms`; `lines` are without punctuation."""

    title: str
    author: str
    form: str
    lines: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether the title or the author is among those that training never sees."""
        return (
            stable_share(f"title:{self.title}") < HELD_OUT_TITLES
            or stable_share(f"author:{self.author}") < HELD_OUT_AUTHORS
        )

    @property
    def text(self) -> str:
        """The verse alone, as `verse` writes it."""
        return verse(self.lines)


def verse(lines: Iterable[str]) -> str:
    """Two lines a text line: `床前明月光，疑是地上霜。`"""
    lines = list(lines)
    return "\n".join(f"{a}，{b}。" for a, b in zip(lines[::2], lines[1::2]))


def split_lines(text: str) -> list[str]:
    """The lines of a verse, without punctuation; the inverse of `verse`, and forgiving about the marks used."""
    return [line for line in re.split(f"{_STOP}+", text) if line]


def form_of(text: str) -> str | None:
    """The form of a verse by its lines and characters; None if it has none of the `forms`, or a gap or a note."""
    return next((form for form, pattern in _PATTERNS.items() if pattern.fullmatch(text)), None)


def is_name(author: str) -> bool:
    """Whether an author's name has no gap, note or second name."""
    return _NAME.fullmatch(author) is not None


def clean_title(title: str) -> str:
    """A title as one would say it, or "" if nothing sayable is left.

    Of `相和歌辞 关山月` the poem's own name, the last part; without numbers in a series (`秋兴八首 一`, `杂诗  其三`),
    notes in parentheses, and the brackets of editors.
    """
    title = re.sub(r"[（(〔].*?[）)〕]", "", title)
    title = re.sub(r"[\[\]〖〗《》「」『』〈〉“”]", "", title)
    parts = [part for part in title.split() if not re.fullmatch(f"其?{_NUMERAL}", part)]
    name = parts[-1] if parts else ""
    name = re.sub(f"{_NUMERAL}(首|绝句?)$", "", name) or name
    return name if _TITLE.fullmatch(name) and name != "句" else ""

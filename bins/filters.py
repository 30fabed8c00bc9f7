"""What a worker finds out about texts beside their ids: their language, and whether they are nearly as earlier ones.

Near-duplicates are found by MinHash (Broder 1997): two texts with Jaccard similarity s of their sets of 8 characters in
a row have the same minimum of a random hash with probability s. With r minima in each of b bands, a whole band is equal
with probability 1 - (1 - s^r)^b, which is one half near the similarity that is asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from bins.screen import SeenDigests

GRAM = 8  # characters
MINIMA = 128  # at most, for all bands of a text
SEED = 1
LANGUAGE_CHARS = 1000  # of a text that are looked at
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 divided by the golden ratio


@dataclass(frozen=True)
class Filters:
    """What is asked for. languages: codes of ISO 639-1 that are kept, () for all; near_duplicates: similarity from
    which a text counts as one that was there before, 0: none does."""

    languages: tuple[str, ...] = ()
    near_duplicates: float = 0.0

    def kept(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether it is in one of the languages."""
        if not self.languages:
            return [True] * len(texts)
        return [identifier().classify(text[:LANGUAGE_CHARS])[0] in self.languages for text in texts]

    def bands(self, texts: Sequence[str]) -> np.ndarray:
        """Return the digest of each band of the MinHash signature of each text, (texts, bands) S16."""
        b, r = shape_of(self.near_duplicates) if self.near_duplicates else (0, 1)
        found = np.zeros((len(texts), b), "S16")
        if not (b and texts):
            return found
        from rensa import RMinHash

        hashes = [gram_hashes(text) for text in texts]
        offsets = np.cumsum([0, *map(len, hashes)]).astype(np.uint64)
        minima = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(hashes), offsets, b * r, SEED)
        rows = np.array(minima.to_rows(), np.uint64).reshape(len(texts), b, r)
        for i, j in np.ndindex(found.shape):
            found[i, j] = hashlib.blake2b(rows[i, j].tobytes(), digest_size=16, salt=j.to_bytes(2, "little")).digest()
        return found


def shape_of(similarity: float) -> tuple[int, int]:
    """Return bands and minima of a band, with which texts of this similarity share a band half of the time: of those
    with at most MINIMA minima the one with the longest bands, which tells similarities best apart."""
    fitting = [(MINIMA, 1)]
    for r in range(1, MINIMA + 1):
        share = min(max(similarity**r, 1e-9), 1 - 1e-9)
        b = max(1, round(math.log(0.5) / math.log1p(-share)))
        fitting += [(b, r)] * (b * r <= MINIMA)
    return fitting[-1]


def gram_hashes(text: str) -> np.ndarray:
    """Return a hash of every GRAM characters in a row, (n,) uint64; white space counts as one blank, case does not."""
    text = " ".join(text.lower().split())
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    n = max(len(codes) - GRAM + 1, 1)
    hashes = np.zeros(n, np.uint64)
    for column in range(min(GRAM, len(codes))):  # a polynomial modulo 2^64, for all places at once
        hashes = hashes * MULTIPLIER + codes[column : column + n]
    hashes ^= hashes >> np.uint64(32)
    return hashes * MULTIPLIER


@cache
def identifier() -> Any:
    """Return py3langid's model (a descendant of langid.py, Lui and Baldwin 2012)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def known_languages() -> list[str]:
    """Return the codes of the languages that can be told apart."""
    return sorted(identifier().labels)


class NearDuplicates:
    """The bands of all texts that were kept. Takes 16 bytes for each band of each text."""

    def __init__(self) -> None:
        self._seen = SeenDigests()

    def fresh(self, bands: np.ndarray) -> list[bool]:
        """Return for each text, with bands (texts, bands) S16, whether none of its bands was there before; keep those
        of these texts."""
        if not bands.size:
            return [True] * len(bands)
        before = self._seen.has(bands.ravel()).reshape(bands.shape).any(1)
        within: set[bytes] = set()
        fresh = []
        for old, own in zip(before, bands.tolist()):
            fresh.append(not old and within.isdisjoint(own))
            if fresh[-1]:
                within.update(own)
        self._seen.add(sorted(within))
        return fresh


def drop(values: Iterable[Any], kept: Iterable[bool]) -> list[Any]:
    """Return the values that are kept."""
    return [value for value, keep in zip(values, kept) if keep]

"""How near a text is to another: BLEU, ROUGE-L, and texts without what does not matter.

Words are compared; a Chinese, Japanese or Korean character is a word of its own.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter

WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+|[^\w\s]")


def words(text: str) -> list[str]:
    """Return the words, the CJK characters and the punctuation marks of a text."""
    return WORD.findall(text)


def normalize(text: str) -> str:
    """Return a text in lower case without blanks and punctuation (Unicode's categories P)."""
    kept = (c for c in text.lower() if not c.isspace() and not unicodedata.category(c).startswith("P"))
    return "".join(kept)


def bleu(answer: str, right: str) -> float:
    """Return the BLEU-4 of a sentence from 0 to 1 (Papineni et al. 2002).

    An order of n-grams without a match counts as 1/2, 1/4, ... matches (smoothing 3 of Chen and Cherry 2014, as in
    sacrebleu); orders that are longer than the answer are left out.
    """
    found, expected = words(answer), words(right)
    logs, halves = [], 1.0
    for n in range(1, min(4, len(found)) + 1):
        grams = [Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for text in (found, expected)]
        matches, total = (grams[0] & grams[1]).total(), grams[0].total()
        if n == 1 and not matches:
            return 0.0
        halves /= 2 if not matches else 1
        logs.append(math.log((matches or halves) / total))
    if not logs:
        return 0.0
    brevity = min(1.0, math.exp(1 - len(expected) / len(found)))
    return brevity * math.exp(sum(logs) / len(logs))


def rouge_l(answer: str, right: str) -> float:
    """Return the F1 of the longest common subsequence of words, from 0 to 1 (Lin 2004)."""
    found, expected = words(answer), words(right)
    longest = [0] * (len(expected) + 1)  # of the words so far and each beginning of `expected`
    for word in found:
        before = 0  # the value that stood one place to the left in the row above
        for i, other in enumerate(expected, 1):
            above = longest[i]
            longest[i] = before + 1 if word == other else max(above, longest[i - 1])
            before = above
    return 2 * longest[-1] / (len(found) + len(expected)) if longest[-1] else 0.0

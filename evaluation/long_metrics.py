"""The scores of LongBench (Bai et al. 2023, arXiv:2308.14508, metrics.py of its repository), each from 0 to 1.

They are written anew and compared in the tests with the packages that the published ones use: rouge, jieba, fuzzywuzzy.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

ARTICLE = re.compile(r"\b(a|an|the)\b")
# what LongBench takes for punctuation in Chinese texts: the full-width signs, brackets, quotes and dots
CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"
    "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
MARKS = frozenset(string.punctuation)
ALL_MARKS = MARKS | frozenset(CHINESE_MARKS)


def english_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in MARKS)
    return ARTICLE.sub(" ", bare).split()


def chinese_words(text: str) -> list[str]:
    """Return the words that jieba finds in a text, in lower case, without blanks and punctuation."""
    found = ("".join(c for c in word.lower() if c not in ALL_MARKS and not c.isspace()) for word in cut(text))
    return [word for word in found if word]


def cut(text: str) -> list[str]:
    """Return the pieces into which jieba cuts a text. Raises ImportError where jieba is not installed."""
    import jieba

    jieba.setLogLevel("ERROR")  # its notice about the dictionary
    return list(jieba.cut(text, cut_all=False))


def shared_f1(found: Sequence[str], expected: Sequence[str]) -> float:
    """Return the F1 of the words that two texts share, each as often as both have it."""
    same = (Counter(found) & Counter(expected)).total()
    return 2 * same / (len(found) + len(expected)) if same else 0.0


def qa_f1(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return the F1 of English words."""
    return shared_f1(english_words(answer), english_words(right))


def qa_f1_zh(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return the F1 of Chinese words."""
    return shared_f1(chinese_words(answer), chinese_words(right))


def rouge(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return ROUGE-L of whole texts as the package rouge 1.0.1 computes it, on sets of words.

    Each sentence of the right text (they end at a point) has longest common subsequences with the sentences of the
    answer; the words of all of them, each counted once, are divided by the different words of either text.
    """
    found, expected = sentences(answer), sentences(right)
    if not answer or not right or not found or not expected:
        return 0.0
    sizes = [len({word for sentence in text for word in sentence}) for text in (found, expected)]
    union: set[str] = set()
    for sentence in expected:
        for other in found:
            union |= set(common_subsequence(sentence, other))
    if not all(sizes):
        return 0.0
    precision, recall = len(union) / sizes[0], len(union) / sizes[1]
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_zh(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return ROUGE-L of the words that jieba finds."""
    return rouge(" ".join(cut(answer)), " ".join(cut(right)))


def sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence; a sentence ends at a point."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """Return a longest common subsequence of two lists; where several are longest, the one that rouge takes."""
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]  # of the first i of a and the first j of b
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            longest[i][j] = longest[i - 1][j - 1] + 1 if x == y else max(longest[i - 1][j], longest[i][j - 1])
    found, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif longest[i - 1][j] > longest[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def classification(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return 1 divided by the number of classes that the answer names, where the right one is among them.

    A class that is a part of the right one ("location" in "other location") does not count. As in the published code,
    one that follows another such class in the list still does.
    """
    named = [each for each in classes if each in answer]
    at = 0
    while at < len(named):
        if named[at] in right and named[at] != right:
            del named[at]  # and the next one is passed over, as where a list is changed in a loop over it
        at += 1
    return 1 / len(named) if right in named else 0.0


def share_of_numbers(answer: str, right: str) -> float:
    """Return which share of the numbers in an answer is the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def retrieval(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in an answer that name the paragraph, "Paragraph 7"."""
    return share_of_numbers(answer, re.findall(r"Paragraph (\d+)", right)[0])


def retrieval_zh(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return the same for a right text such as "段落7"."""
    return share_of_numbers(answer, re.findall(r"段落(\d+)", right)[0])


def count(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers in an answer that is the right number."""
    return share_of_numbers(answer, right)


def code_similarity(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Return how much the first line of code in an answer is like the right line, in hundredths: fuzzywuzzy's ratio.

    Lines with a backtick, # or // are taken for comments.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((each for each in lines if not any(sign in each for sign in ("`", "#", "//"))), "")
    if not line or not right:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, right).ratio()) / 100


Metric = Callable[[str, str, Sequence[str]], float]


def best(metric: Metric, answer: str, rights: Iterable[str], classes: Sequence[str], first_line: bool) -> float:
    """Return the score of an answer against the right text that it fits best. first_line: only that one counts."""
    if first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    return max((metric(answer, right, classes) for right in rights), default=0.0)

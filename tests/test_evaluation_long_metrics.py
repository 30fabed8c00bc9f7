"""The scores of LongBench against the packages that the published ones use, and against its definitions."""

import difflib
import random
import re

import pytest

from evaluation import long_metrics as ours

PIECES = {
    "en": ["the", "a", "cat", "sat", "on", "mat.", "Mat", "1999", "it's", "A.", "end.", ".", "no-one", "cat"],
    "zh": ["江上", "有", "一只", "白鹭", "，", "飞得", "很慢", "。", "明月", "照", "溪边", "2024", "年", ".", "ABC"],
}


def texts(language: str, n: int = 300, seed: int = 0):
    """Random texts of a language, among them empty ones, equal ones, and points alone."""
    draw, join = random.Random(seed), " " if language == "en" else ""
    for _ in range(n):
        a, b = (join.join(draw.choice(PIECES[language]) for _ in range(draw.randint(0, 14))) for _ in range(2))
        yield a, (a if draw.random() < 0.1 and a else b)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_rouge_l_is_that_of_the_package(language):
    package = pytest.importorskip("rouge").Rouge()
    if language == "zh":
        jieba = pytest.importorskip("jieba")
    checked = 0
    for a, b in texts(language):
        found = ours.rouge_zh(a, b) if language == "zh" else ours.rouge(a, b)
        if language == "zh":
            a, b = (" ".join(jieba.cut(text)) for text in (a, b))
        try:
            expected = package.get_scores([a], [b], avg=True)["rouge-l"]["f"]
        except (ValueError, RecursionError):  # an empty text
            expected = 0.0
        assert found == pytest.approx(expected, abs=1e-12), (a, b)
        checked += expected > 0
    assert checked > 150


def f1_by_definition(found: list[str], expected: list[str]) -> float:
    left, same = list(expected), 0
    for word in found:
        if word in left:
            left.remove(word)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def test_f1_of_english_words():
    assert ours.english_words("The cat's  A-list, a dog.") == ["cats", "alist", "dog"]
    for a, b in texts("en"):
        words = []
        for text in (a, b):  # as SQuAD defines them
            bare = re.sub(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]", "", text.lower())
            words.append(re.sub(r"\b(a|an|the)\b", " ", bare).split())
        assert ours.qa_f1(a, b) == pytest.approx(f1_by_definition(*words))


def test_f1_of_chinese_words():
    jieba = pytest.importorskip("jieba")
    checked = 0
    for a, b in texts("zh"):
        words = []
        for text in (a, b):
            cut = ("".join(re.findall(r"\w", word.lower())) for word in jieba.cut(text))
            words.append([word for word in cut if word])
        expected = f1_by_definition(*words)
        assert ours.qa_f1_zh(a, b) == pytest.approx(expected)
        checked += expected > 0
    assert checked > 100


def test_code_similarity_is_the_ratio_of_fuzzywuzzy():
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choice("ab(x) =") for _ in range(draw.randint(0, 30))) for _ in range(2))
        assert ours.code_similarity(a, b) == pytest.approx(fuzz.ratio(a, b) / 100)


@pytest.mark.parametrize(
    ("answer", "line"),
    [("\n\nx = 1\ny = 2", "x = 1"), ("# no\n```python\n// no\nreturn x\n", "return x"), ("# only", ""), ("", "")],
)
def test_the_first_line_of_code_counts(answer, line):
    expected = round(100 * difflib.SequenceMatcher(None, line, "x = 12").ratio()) / 100 if line else 0.0
    assert ours.code_similarity(answer, "x = 12") == expected


def published_classification(answer: str, right: str, classes: list[str]) -> float:
    """As it is described: named classes, less those that are a part of the right one; a list changed in its loop."""
    named = [each for each in classes if each in answer]
    for each in named:
        if each in right and each != right:
            named.remove(each)
    return 1 / len(named) if right in named else 0.0


def test_classes():
    classes = ["location", "other location", "loc", "human", "other"]
    draw = random.Random(0)
    for _ in range(300):
        answer = " ".join(draw.choice([*classes, "x"]) for _ in range(draw.randint(0, 4)))
        right = draw.choice(classes)
        assert ours.classification(answer, right, classes) == published_classification(answer, right, classes)
    assert ours.classification("human or other", "human", classes) == 0.5


def test_numbers():
    assert ours.count("5 or 7, then 5", "5") == pytest.approx(2 / 3) and ours.count("none", "5") == 0
    assert ours.retrieval("Paragraph 12", "Paragraph 12") == 1 and ours.retrieval("1, 12", "Paragraph 12") == 0.5
    assert ours.retrieval_zh("段落3", "段落3") == 1 and ours.retrieval_zh("13", "段落3") == 0


def test_the_best_of_several_right_texts_and_the_first_line():
    args = ("\nthe cat\nthe dog", ["a dog", "cat"], [])
    assert ours.best(ours.qa_f1, *args, first_line=True) == 1
    assert ours.best(ours.qa_f1, *args, first_line=False) == pytest.approx(2 / 3)
    assert ours.best(ours.qa_f1, "x", [], [], first_line=False) == 0

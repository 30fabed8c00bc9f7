"""Rows that are made in the published layouts are read by our own tasks, none of them bad, and are right or wrong."""

import random
import re

import pytest
from harness_rows import BLIMP, SHOTS, ZHOBLIMP, long_row, swapped, write_exam, write_longeval, write_pairs, write_texts

import eval as eval_script
from evaluation.exam_subjects import ACLUE
from evaluation.long_context import SETS
from evaluation.registry import make_task

DIGITS = "零一二三四五六七八九"
ZH = ["".join(DIGITS[int(digit)] for digit in f"{7919 * n:012d}") + "。" for n in range(400)]
EN = [f"Boat {n} crosses the bay number {n % 7} in the morning." for n in range(400)]


def read(name: str, data, **options):
    task = make_task(name, eval_script.Args(task=name, data=data, **options))
    items = [item for block in task.chosen() for item in block]
    assert not task.broken and len({item.key for item in items}) == len(items)
    return items


def test_an_examination_asks_for_what_a_sentence_lacks(tmp_path):
    write_exam(tmp_path, [*ACLUE][:2], ZH, random.Random(1))
    items = read("aclue", tmp_path, shots=SHOTS)
    assert len({item.subject for item in items}) == 2 and all(len(item.shots) == SHOTS for item in items)
    for item in items:
        sentence, *options = item.question.splitlines()[:5]
        assert sentence.replace("____", options[item.answer].removeprefix("ABCD"[item.answer] + ". ")) in ZH


@pytest.mark.parametrize(
    ("task", "names", "sentences", "space"), [("blimp", BLIMP, EN, " "), ("zhoblimp", ZHOBLIMP, ZH, "")]
)
def test_pairs_differ_by_the_order_of_two_parts(task, names, sentences, space, tmp_path):
    write_pairs(tmp_path, names, sentences, space, random.Random(1))
    items = read(task, tmp_path)
    assert {item.subject for item in items} == set(names)
    for item in items:
        good, bad = item.choices
        assert good.strip() in sentences and good != bad and sorted(good) == sorted(bad)
    assert swapped(random.Random(1), ["a", "a", "b", "c"]) == ["a", "b", "a", "c"]  # equal neighbours stay


@pytest.mark.parametrize("name", SETS)
def test_the_right_answer_to_a_long_prompt_has_the_full_score(name):
    language, metric = SETS[name]
    row = long_row(random.Random(1), name, language, {"zh": ZH, "en": EN}, 0)
    (answer,) = row["answers"]
    assert metric(answer, answer, row["all_classes"] or []) == pytest.approx(1)
    if name.startswith("passage"):  # as published: a paragraph has a name with its number, a count is a number
        assert re.fullmatch({"en": r"Paragraph \d+", "zh": r"段落\d+"}.get(name[-2:], r"\d+"), answer)


def test_long_prompts_and_texts(tmp_path):
    rng = random.Random(1)
    write_longeval(tmp_path / "longeval", EN, rng)
    for item in read("longeval", tmp_path / "longeval"):
        if item.category == "lines":
            wanted = item.question.rpartition("in line ")[2].partition("?")[0]
            assert f"line {wanted}: REGISTER_CONTENT is <{item.answer}>" in item.question
        else:
            assert item.question.index(item.answer[0]) == min(map(item.question.index, item.answer))
    write_texts(tmp_path / "texts", {"zh": ZH, "en": EN}, rng)
    assert len(read("perplexity", tmp_path / "texts")) == 120

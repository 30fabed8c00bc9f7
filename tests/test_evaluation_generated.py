"""Generated answers and losses of texts: scores by hand, by definition, and against the model read directly."""

import dataclasses
import json
import math
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.tiny_chat_model import save_chat_model

from checkpoint.directory import load_model
from decoding.params import SamplingParams
from eval import Args, main
from evaluation.generated import GSM8K, plain_number
from evaluation.perplexity import language
from evaluation.text_metrics import bleu, normalize, rouge_l, words
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("run") / "step_00000007", max_seq_len=512)


def items_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.with_suffix(".items.jsonl").open(encoding="utf8")]


# ---- metrics


def test_words_are_words_and_chinese_characters():
    assert words("江上, the 2 moons!") == ["江", "上", ",", "the", "2", "moons", "!"]
    assert normalize("  The Moon, 江上。") == "themoon江上"


@pytest.mark.parametrize(
    ("answer", "right", "expected"),  # the values of sacrebleu 2.5, tokenize none, effective order
    [
        ("a b c d", "a b c e", 0.5946035575),
        ("a", "a b", 0.3678794412),
        ("a b a b c", "a b c a b c", 0.4093653765),
        ("a c b d e", "a b c d e", 0.2686424830),
        ("x y", "a b", 0.0),
        ("", "a b", 0.0),
    ],
)
def test_bleu_is_that_of_sacrebleu(answer, right, expected):
    assert bleu(answer, right) == pytest.approx(expected)


def test_rouge_l_is_the_longest_common_subsequence_by_definition():
    rng = random.Random(0)

    for _ in range(200):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(0, 7))] for _ in range(2))

        @cache
        def longest(i: int, j: int, a=tuple(a), b=tuple(b)) -> int:
            if i == len(a) or j == len(b):
                return 0
            return longest(i + 1, j + 1) + 1 if a[i] == b[j] else max(longest(i + 1, j), longest(i, j + 1))

        common = longest(0, 0)
        expected = 2 * common / (len(a) + len(b)) if common else 0
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


# ---- GSM8K


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("He has 3 + 4 = 7.\n#### 7", 1, 1),
        ("so it is $7.", 0, 1),
        ("#### 8, but 7", 0, 1),
        ("#### 7,000", 0, 0),
        ("none", 0, 0),
        ("-7", 0, 0),
    ],
)
def test_the_number_of_an_answer(answer, strict, flexible):
    item = type("Item", (), {"answer": "3 + 4\n#### 7"})
    assert GSM8K.score(None, item, answer) == {"strict": [strict, 1], "flexible": [flexible, 1]}


def test_numbers_are_compared_without_commas_and_dollars():
    assert plain_number("a #### $70,000.") == plain_number("70000")


def test_gsm8k_shows_solved_examples_and_cuts_what_comes_after_the_answer(model, tmp_path):
    train = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(9)]
    test = [{"question": "2 + 2?", "answer": "#### 4"}, {"question": "", "answer": "#### 4"}]
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Args(model=model, task="gsm8k", data=tmp_path, shots=2, output=tmp_path / "g.json")
    result = main(args)
    drawn = random.Random(1234).sample(train, 2)
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in drawn)
    assert result["first_prompt"] == shots + "Question: 2 + 2?\nAnswer:"
    assert (result["all"]["strict"]["items"], result["bad_rows"]) == (1, 1)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"--shots 2 needs .*train.jsonl; --shots 0 needs none"):
        main(args)


# ---- the user's own answers


def test_own_answers_are_asked_as_a_conversation_and_the_best_of_several_counts(model, tmp_path):
    sampling = SamplingParams(temperature=0, max_new_tokens=20)
    said = main(Args(model=model, prompt="江上有何", sampling=sampling))["answer"]
    path = tmp_path / "qa.jsonl"
    rows = [
        {"question": "江上有何", "answer": ["无", said]},
        {"question": "江上有何", "answer": said + " x"},
        {"answer": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Args(model=model, task="answers", data=path, sampling=sampling, output=tmp_path / "a.json")
    result = main(args)
    records = items_of(args.output)
    assert [record["answer"] for record in records] == [said, said]
    assert records[0]["scores"] == {"exact": [1, 1], "bleu": [pytest.approx(1), 1], "rouge_l": [pytest.approx(1), 1]}
    assert records[1]["scores"]["exact"] == [0, 1]
    assert 0 < records[1]["scores"]["rouge_l"][0] < 1
    assert result["bad_rows"] == 1


# ---- perplexity


@pytest.mark.parametrize("stride", [None, 10, 48])
def test_perplexity_of_documents_longer_than_the_window(model, tmp_path, stride):
    texts = ["床前明月光，疑是地上霜。" * 3, "the moon above the river", "x"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    window = 48
    args = Args(model=model, task="perplexity", data=tmp_path / "a.jsonl", stride=stride, max_seq_len=window)
    args = dataclasses.replace(args, output=tmp_path / "p.json", per_document=tmp_path / "documents.jsonl")
    result = main(args)
    loaded, tokenizer = load_model(model).eval(), load_tokenizer(model)
    nats, n_tokens = 0.0, 0
    step = stride or window // 2
    for text, record in zip(texts, items_of(args.output)):
        ids, document = [tokenizer.eos_id, *tokenizer.encode(text)], 0.0
        for at in range(1, len(ids)):
            # the end of the window in which the id at `at` is judged, and its first id
            end = window if at <= window else window + step * math.ceil((at - window) / step)
            end = min(end, len(ids) - 1)
            with torch.no_grad():
                logits = loaded(torch.tensor([ids[max(0, end - window) : at]]))[0, -1].double()
            document -= logits.log_softmax(-1)[ids[at]].item()
        assert record["scores"]["loss"] == [pytest.approx(document, abs=1e-3), len(ids) - 1]
        assert record["scores"]["bits_per_byte"] == [
            pytest.approx(document / math.log(2), abs=1e-3),
            len(text.encode()),
        ]
        nats, n_tokens = nats + document, n_tokens + len(ids) - 1
    assert result["all"]["loss"]["value"] == pytest.approx(nats / n_tokens, abs=1e-4)
    assert result["by_category"].keys() == {"zh", "other"}
    rows = [json.loads(line) for line in (tmp_path / "documents.jsonl").open()]
    assert sorted(row["document"] for row in rows) == [0, 1, 2] and {row["file"] for row in rows} == {"a.jsonl"}
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    assert sum(row["loss"] * row["tokens"] for row in rows) == pytest.approx(nats, abs=1e-3)
    assert [row["bytes"] for row in rows] == [len(texts[row["document"]].encode()) for row in rows]
    for flag in ("output", "per_document"):
        with pytest.raises(ValueError, match=rf"--{flag} .*none.* is no directory"):  # before it measures
            dataclasses.replace(args, **{flag: tmp_path / "none" / "documents.jsonl"})
    assert not (tmp_path / "q.items.jsonl").exists()


def test_languages():
    assert [language(text) for text in ("江上 the", "the 江 river above", "1984", "")] == [
        "zh",
        "other",
        "other",
        "other",
    ]

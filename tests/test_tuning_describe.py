"""What a fine-tuning run tells about its data, and what --show prints instead of training."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_chat_model import chat_tokenizer, save_chat_model

import fine_tuning
from chat.samples import CONVERSATIONS, Samples
from cli.args import parse
from tuning.args import DataArgs
from tuning.data import Split
from tuning.describe import counts, evaluated, not_used, too_long

PATH = Path("chats.jsonl")
STATS = {"conversations": 585, "samples": 584, "tokens": 63013, "targets": 48381, "cut": 0, "dropped": 0, "beyond": 0}
STATS |= {"without_target": 0, "turns": 585}


def samples(enough: int = 426, **changes: int) -> Samples:
    return Samples(np.empty(0), np.empty(0), np.zeros(1), STATS | changes, enough)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({}, "585 conversations, 63,013 tokens, of which 48,381 are answers and are trained on."),
        (
            {"turns": 1200},
            "585 conversations with 1,200 answers, 63,013 tokens, of which 48,381 are answers and are trai",
        ),
        ({"without_target": 1}, "trained on. 1 conversation without an answer to train is skipped."),
        ({"without_target": 20}, "trained on. 20 conversations without an answer to train are skipped."),
        ({"conversations": 1, "turns": 1, "tokens": 1, "targets": 1}, "1 conversation, 1 token, of which 1 "),
    ],
)
def test_counts_in_words(changes, sentence):
    assert sentence in counts(samples(**changes), "conversations")


def test_pairs_that_are_the_same_are_counted():
    text = counts(Samples(*[np.empty(0)] * 3, {"pairs": 9, "tokens": 50, "targets": 10, "alike": 2}), "pairs")
    assert text.startswith("9 pairs, 50 tokens") and text.endswith(" 2 pairs with two equal answers are skipped.")


def test_what_a_row_leaves_out():
    assert too_long(PATH, samples(), "conversations", 128, 512) == ""
    text = too_long(PATH, samples(cut=358, beyond=1), "conversations", 128, 512)
    assert text == (
        "chats.jsonl: 61 % of the conversations are longer than a row of 128 tokens: 358 are cut at the end and 1 is "
        "skipped (the answer begins after the end of the row). --data.seq_len 426 would keep 90 % of them whole."
    )
    text = too_long(PATH, samples(dropped=2), "conversations", 128, 256)
    assert "2 are skipped (--data.too_long cut would keep the beginning). --data.seq_len 426 would keep" in text
    assert text.endswith(
        "more than its 256 positions: continue its pretraining with pretrain.py --init_from and "
        "--model.max_seq_len 426."
    )


# ---- --show


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """model/, tokenizer/, two files of conversations, the second with a broken record, and pairs.jsonl."""
    save_chat_model(tmp_path / "model")
    chat_tokenizer(tmp_path).save(tmp_path / "tokenizer")
    records = {
        "chats": [{"prompt": f"moon {n}?", "answer": "the </s>"} for n in range(3)],
        "more": [{"prompt": "sun?", "answer": "river"}, {"prompt": "no answer"}],
        "pairs": [{"prompt": "moon?", "chosen": "the moon", "rejected": "river"}] * 2,
    }
    for name, lines in records.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def show(folder: Path, data: str, *flags: str, init_from: str = "model") -> dict:
    paths = ",".join(str(folder / f"{name}.jsonl") for name in data.split())
    where = ["--init_from", str(folder / init_from), "--data", paths, "--out", str(folder / "run")]
    args = parse(fine_tuning.Args, "fine_tuning", [*where, "--data.heldout_share", "0", *flags])
    found = fine_tuning.main(args)
    assert not (folder / "run").exists()
    return found


@pytest.mark.parametrize("init_from", ["model", "tokenizer"])
def test_targets_are_marked(folder, init_from, capsys, monkeypatch):
    found = show(folder, "chats", "--show", "2", init_from=init_from)
    said = capsys.readouterr().out
    assert "<s><|user|>moon 0?<|end|><|assistant|>⟦the </s><|end|>⟧" in said and "\x1b" not in said
    assert "moon 1?" in said and "moon 2?" not in said and "--- sample 2: " in said
    assert found["chats"]["samples"] == 3
    tokens, targets = found["chats"]["tokens"], found["chats"]["targets"]
    each = tokens // 3
    assert said[said.index(f"---\n{folder}") :] == (
        f"---\n{folder / 'chats.jsonl'}:\n"
        f"3 conversations, {tokens} tokens, of which {targets} are answers and are trained on.\n"
        f"The shortest sample has {each} tokens, half have at most {each}, nine in ten at most {each}, "
        f"the longest has {each}.\n"
        "Chat template: ours.\n"
    )
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(folder, "chats", "--show", "1", init_from=init_from)
    assert "<|assistant|>\x1b[32mthe </s><|end|>\x1b[0m" in capsys.readouterr().out


def test_each_task_is_shown_with_its_broken_records(folder, capsys):
    found = show(folder, "chats more", "--show", "1")
    said = capsys.readouterr().out
    assert list(found) == ["chats", "more"] and (found["chats"]["broken"], found["more"]["broken"]) == (0, 1)
    assert "⟦river<|end|>⟧" in said
    assert f"1 record cannot be read; the first:\nbroken: {folder / 'more.jsonl'}:2: the record has no question" in said


def test_both_answers_of_a_pair_are_shown(folder, capsys):
    found = show(folder, "pairs", "--show", "1", "--objective", "dpo")
    said = capsys.readouterr().out
    chosen, rejected = said.index("--- sample 1 chosen: "), said.index("--- sample 1 rejected: ")
    assert chosen < said.index("⟦the moon<|end|>⟧") < rejected < said.index("⟦river<|end|>⟧")
    assert "pair 2" not in said and found["pairs"]["pairs"] == 2
    assert f"---\n{folder / 'pairs.jsonl'}:\n2 pairs, " in said
    with pytest.raises(ValueError, match=r"use a preference objective, such as --objective dpo"):
        show(folder, "pairs", "--show", "1")


def test_what_is_not_used_is_shown_with_its_count(folder, capsys):
    records = [{"ask": f"{n}?", "answer": "a", "title": "t" * (n < 2), "id": n} for n in range(3)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    show(folder, "chats", "--show", "1")
    path = folder / "chats.jsonl"
    assert capsys.readouterr().out.endswith(
        f"{path}: 3 records have `id`, which is not used.\n{path}: 2 records have `title`, which is not used.\n"
    )
    assert not_used(path, Counter({"`x`, which is not used": 1})) == [f"{path}: 1 record has `x`, which is not used."]


@pytest.mark.parametrize(
    ("sizes", "warning"),
    [
        ([30], ""),
        ([0, 30], ""),
        ([29], "29 conversations held out are too few to tell a small gain from chance, 30 or more would do: raise"),
        ([400, 1], "1 conversation held out is too few"),
    ],
)
def test_few_held_out_conversations_are_warned_of(sizes, warning):
    heldout = [Samples(np.empty(0), np.empty(0), np.zeros(n + 1), {}) for n in sizes]
    data = DataArgs(train=tuple(Path(f"{n}.jsonl") for n in range(len(sizes))), heldout=())
    text = evaluated(data, Split([], heldout, {}, {}), CONVERSATIONS)
    assert text.startswith(f"held out to evaluate on: {' + '.join(map(str, sizes))} conversations (")
    assert text.partition("\n")[2].startswith(warning) and bool(warning) == ("\n" in text)


def test_new_tokens_are_shown_as_they_would_be_trained(folder, capsys):
    markers = ["--add_special_tokens", "<|im_start|>", "<|im_end|>"]
    show(folder, "chats", "--show", "1", "--data.template", "chatml", *markers, init_from="tokenizer")
    assert "⟦the </s><|im_end|>" in capsys.readouterr().out

"""The whole pipeline in miniature, from raw text to a chat, through the scripts' own `main`: what each stage leaves is
compared with what went in, with a counting model, and with transformers."""

import io
import json
import math
import sys

import numpy as np
import pytest
from helpers.miniature import BROKEN, EXCHANGES, NAMES, Miniature

from bins.token_bin import TokenBin
from chat.template import load_template
from checkpoint.directory import load_model
from dataset import PretrainData
from decoding.generate import generate
from decoding.params import SamplingParams
from model import Transformer
from tokenizer import load_tokenizer
from training.heldout import evaluate

GREEDY = SamplingParams(temperature=0, max_new_tokens=60)


def texts_in(miniature: Miniature, name: str) -> list[str]:
    """The documents of a bin, decoded."""
    tokens = TokenBin(miniature.folder / f"data/mine/{name}.bin")
    tokenizer = load_tokenizer(miniature.folder / "data/mine/tokenizer")
    return [tokenizer.decode(tokens.tokens[a:b]) for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:])]


def test_every_text_is_in_one_bin_word_for_word(miniature: Miniature) -> None:
    train, heldout = texts_in(miniature, "train_00000"), texts_in(miniature, "heldout")
    assert sorted(train + heldout) == sorted(miniature.texts)
    assert 0.05 < len(heldout) / len(miniature.texts) < 0.15  # asked for: a tenth, by hash
    total = miniature.results["data_process"]["total"]
    assert (total["documents"], total["held_out"], total["bad"]) == (len(miniature.texts), len(heldout), 1)
    (record,) = map(json.loads, (miniature.folder / "data/mine/bad_records.jsonl").read_text().splitlines())
    assert record["raw"] == BROKEN and "notes.jsonl" in record["where"]


def test_pretraining_learns_more_than_which_token_follows_which(miniature: Miniature) -> None:
    loss = miniature.results["pretrain"]["loss"]
    train, heldout = (TokenBin(miniature.folder / f"data/mine/{name}.bin") for name in ("train_00000", "heldout"))
    vocab_size = train.meta["vocab_size"]
    singles = np.bincount(train.tokens, minlength=vocab_size) + 1.0  # what was never seen is not impossible
    unigram = -np.log(singles / singles.sum())[heldout.tokens].mean()
    pairs = np.full((vocab_size, vocab_size), 0.05)
    np.add.at(pairs, (train.tokens[:-1], train.tokens[1:]), 1)
    bigram = -np.log(pairs / pairs.sum(1, keepdims=True))[heldout.tokens[:-1], heldout.tokens[1:]].mean()
    # About 0.75, 1.0, 3.9 and 6.0 nats: where one is in a line or a sentence, a pair of tokens does not tell.
    assert loss < 0.9 * bigram and loss < 0.3 * unigram and unigram < 0.8 * math.log(vocab_size)
    assert loss == pytest.approx(measure(miniature)["loss"], abs=1e-4)  # what is on disk is what was measured


def measure(miniature: Miniature, model: Transformer | None = None) -> dict[str, float]:
    """Held-out loss of the pretrained model, or of another one."""
    directory = miniature.folder / "out/mine/pretrain/best"
    data = PretrainData([TokenBin(miniature.folder / "data/mine/heldout.bin")], 64, 16, seed=0, shuffle=False)
    return evaluate(model or load_model(directory), data, load_tokenizer(directory).token_bytes())


def test_bits_per_byte_count_the_bytes_of_the_text_and_fall(miniature: Miniature) -> None:
    after = miniature.results["pretrain"]
    n_tokens = len(TokenBin(miniature.folder / "data/mine/heldout.bin"))
    n_bytes = sum(len(text.encode()) for text in texts_in(miniature, "heldout"))
    assert after["bits_per_byte"] == pytest.approx(after["loss"] * n_tokens / math.log(2) / n_bytes, rel=1e-6)
    fresh = Transformer(load_model(miniature.folder / "out/mine/pretrain/best").args)
    before = measure(miniature, fresh)
    assert before["loss"] == pytest.approx(math.log(fresh.args.vocab_size), abs=0.3)  # knows nothing: all are as likely
    assert math.isfinite(after["bits_per_byte"]) and after["bits_per_byte"] < before["bits_per_byte"] / 3


def test_eval_measures_the_same_loss(miniature: Miniature) -> None:
    files = "--heldout data/mine/heldout.bin --sft_heldout my_chats.jsonl"
    before = miniature.run(f"python eval.py --task loss --model out/mine/pretrain --seq_len 64 {files}")
    result = miniature.results["pretrain"]
    assert before["heldout"] == pytest.approx({name: result[name] for name in ("loss", "bits_per_byte")}, rel=1e-5)
    after = miniature.run(f"python eval.py --task loss --model out/mine/sft --seq_len 96 {files}")
    assert after["my_chats"]["loss"] < 0.1 < before["my_chats"]["loss"]


# ---- answers


def test_trained_questions_are_answered_word_for_word(miniature: Miniature) -> None:
    result = miniature.run("python eval.py --model out/mine/sft/best --input questions.jsonl --output answers.jsonl")
    rows = [json.loads(line) for line in (miniature.folder / "answers.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row["answer"] for row in rows} == EXCHANGES and result["answers"] == len(EXCHANGES)
    answer = miniature.run(f"python eval.py --model out/mine/sft --prompt '{next(iter(EXCHANGES))}'")["answer"]
    assert answer == next(iter(EXCHANGES.values()))


def test_an_answer_ends_with_its_end_token(miniature: Miniature) -> None:
    directory = miniature.folder / "out/mine/sft/best"
    tokenizer, model = load_tokenizer(directory), load_model(directory)
    template = load_template(tokenizer)
    prompts = [template.encode(user(question), add_generation_prompt=True)[0] for question in EXCHANGES]
    unstopped = generate(model, prompts, GREEDY)
    for answer, ids in zip(EXCHANGES.values(), unstopped):
        end = ids.index(tokenizer.special_id("<|end|>"))
        assert tokenizer.decode(ids[:end]) == answer


def user(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def test_the_chat_over_a_pipe_remembers_until_told_to_forget(
    miniature: Miniature, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = [line for name in NAMES for line in (f"我叫{name}", "我叫什么？", "/reset")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert miniature.run("python eval.py --model out/mine/sft/best") == {"answered": 2 * len(NAMES)}
    expected = [answer for name in NAMES for answer in (f"你好，{name}。", f"你叫{name}。")]
    assert capsys.readouterr().out.splitlines() == expected


# ---- transformers


def test_transformers_reads_the_directory_and_answers_the_same(miniature: Miniature) -> None:
    transformers = pytest.importorskip("transformers")
    directory = miniature.folder / "out/mine/sft/best"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for question, answer in EXCHANGES.items():
        prompt = tokenizer.apply_chat_template(user(question), add_generation_prompt=True, return_tensors="pt")
        # its own generation_config.json says where to stop
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=60)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=False) == answer + "<|end|>"

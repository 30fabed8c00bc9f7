"""Rows drawn from bins and texts: from all of them, each once, the same for a seed."""

import gzip
import json

import numpy as np
import pytest
from helpers.tiny_texts import train_tiny_tokenizer

from bins.token_bin import BinWriter
from evaluation import text_rows
from evaluation.text_rows import draw_rows
from tokenizer import load_tokenizer

LENGTH, N_TOKENS = 8, 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def places(rows, ids):
    """Return where each row stands in `ids`, in rows."""
    at = {tuple(ids[i : i + LENGTH]): i // LENGTH for i in range(0, len(ids), LENGTH)}
    return [at[tuple(row.tolist())] for row in rows]


def test_rows_come_from_all_of_a_long_bin(tmp_path, tokenizer):
    # its first ENOUGH * N_TOKENS tokens are a tenth of it
    count = 10 * text_rows.ENOUGH * N_TOKENS // LENGTH
    ids = np.random.default_rng(0).integers(300, tokenizer.vocab_size, count * LENGTH)
    with BinWriter(tmp_path / "train", tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
        writer.add([*ids, tokenizer.eos_id])
    found = [draw_rows([tmp_path / "train.bin"], tokenizer, LENGTH, N_TOKENS, seed) for seed in range(40)]
    at = np.array([places(rows, ids) for rows in found]) / count
    assert at.shape == (40, N_TOKENS // LENGTH)
    assert all(len(set(each)) == len(each) for each in at)
    # 200 places, uniform in 0..1: their mean has a standard deviation of 0.29 / sqrt(200) = 0.02
    assert abs(at.mean() - 0.5) < 0.1 and at.max() > 0.9 and at.min() < 0.1
    again = draw_rows([tmp_path / "train.bin"], tokenizer, LENGTH, N_TOKENS, 3)
    assert again.equal(found[3]) and not again.equal(found[4])


def test_rows_come_from_each_of_several_files(tmp_path, tokenizer):
    streams = np.random.default_rng(0).integers(300, tokenizer.vocab_size, (3, 800))
    for k, ids in enumerate(streams):
        with BinWriter(tmp_path / f"b{k}", tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
            writer.add([*ids, tokenizer.eos_id])
    paths = [tmp_path / f"b{k}.bin" for k in range(3)]
    rows = draw_rows(paths, tokenizer, LENGTH, 10**6, 0)  # all there are
    assert sorted(map(tuple, rows.tolist())) == sorted(
        tuple(ids[i : i + LENGTH].tolist()) for ids in streams for i in range(0, 800, LENGTH)
    )


def test_documents_are_drawn_from_all_of_a_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_rows, "MOST_DOCUMENTS", 20)
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"number {n} of all"}) for n in range(400)))
    drawn = [text_rows.draw_texts(path, np.random.default_rng(seed)) for seed in range(20)]
    numbers = np.array([[int(text.split()[1]) for text in texts] for texts in drawn])
    assert numbers.shape == (20, 20) and all(len(set(each)) == 20 for each in numbers)
    assert abs(numbers.mean() - 200) < 25  # standard deviation 115 / sqrt(400) = 6
    assert draw_rows([path], tokenizer, LENGTH, N_TOKENS, 0).shape == (5, LENGTH)


def test_records_that_cannot_be_read_are_counted(tmp_path, tokenizer, capsys):
    lines = [json.dumps({"text": f"number {n} of all"}) for n in range(400)]
    (tmp_path / "texts.jsonl").write_text("\n".join([*lines, "{", '{"text": 3}']))
    draw_rows([tmp_path / "texts.jsonl"], tokenizer, LENGTH, N_TOKENS, 0)
    assert "texts.jsonl: records that cannot be read are left out: 2; the first, " in capsys.readouterr().err
    packed = gzip.compress("\n".join(lines).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    draw_rows([tmp_path / "cut.jsonl.gz"], tokenizer, LENGTH, N_TOKENS, 0)
    assert "cut.jsonl.gz: records that cannot be read are left out: " in capsys.readouterr().err

"""Made-up verses and prose that tests train tokenizers on, in place of a corpus."""

import random
from pathlib import Path

import pytest

import corpora
from corpora import Document
from train_tokenizer import Args

RNG = random.Random(0)
HAN = [chr(c) for c in range(0x4E00, 0x4E00 + 400)]
VERSES = ["".join(RNG.choices(HAN[:80], k=5)) + "，" + "".join(RNG.choices(HAN[:80], k=5)) + "。" for _ in range(400)]
PROSE = [
    "The cat sat on the mat, and the dog sat by the door.",
    "A cat and a dog 12 34",
    "    indented  twice",
    "ten, ten",
]
TEXTS = ["\n".join(VERSES[i : i + 4]) for i in range(0, 400, 4)] + PROSE * 5


@pytest.fixture
def corpus(monkeypatch):
    """Give train_tokenizer these records for any source; plain strings are documents to train on."""

    def give(records) -> None:
        stream = [Document(r, "test", held_out=False) if isinstance(r, str) else r for r in records]
        monkeypatch.setattr(corpora, "read", lambda source: iter(stream))

    give(TEXTS)
    return give


def args(tmp_path: Path, **changes) -> Args:
    return Args(**({"out": tmp_path / "tokenizer", "vocab_size": 460} | changes))

"""Made-up text and a tokenizer trained on it, in a second: for tests that need some and have none at hand."""

import random
from pathlib import Path

import sentencepiece

HANZI = [chr(0x4E00 + i) for i in range(300)]
WORDS = ["the", "river", "ran", "below", "a", "moon", "of", "1984", "and", "nobody", "saw", "it"]


def made_up_texts(count: int, seed: int = 0) -> list[str]:
    """Different texts of 20 to a few hundred characters: Chinese, English, digits, newlines, now and then an emoji."""
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        parts = [f"{number}、"]
        for _ in range(rng.randint(1, 8)):
            hanzi = "".join(rng.choices(HANZI, k=rng.randint(5, 30)))
            parts.append(rng.choice([hanzi + "。", " ".join(rng.choices(WORDS, k=8)) + ".\n", hanzi + "，\n", "🌙\t"]))
        texts.append("".join(parts) + "the end of a text")
    return texts


def train_tiny_tokenizer(folder: Path, vocab_size: int = 700) -> Path:
    """A SentencePiece model of `vocab_size` pieces with byte fallback, as `folder/tiny.model`."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(made_up_texts(300, seed=99)),
        model_prefix=str(folder / "tiny"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=3,
        minloglevel=2,
    )
    return folder / "tiny.model"

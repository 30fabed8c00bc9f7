"""Lines on which tokenizers of different programs are compared."""

import random

from helpers.vocabularies import BLANKS, WORDS


def varied(count: int, seed: int = 0) -> list[str]:
    """Lines of both scripts, code, emoji, control characters and the names of special tokens."""
    rng = random.Random(seed)
    ranges = [(32, 127), (0x4E00, 0x9FA5), (0xA0, 0x600), (0x1F300, 0x1F6FF), (1, 32)]
    odd = ["\U0001f600", "\x01", "\x1b", "\x7f", "<s>", "</s>", "<unk>", "<|end|>", "def f(x):"]
    parts = [*WORDS.split(), *BLANKS, *odd, *(chr(rng.randrange(*rng.choice(ranges))) for _ in range(400))]

    def line() -> str:
        return "".join(rng.choice(parts) * rng.choice([1, 1, 1, 2, 5]) for _ in range(rng.randrange(1, 14)))

    return [line() for _ in range(count)]

"""A tokenizer beside a text, and beside the model that it is used with."""

from __future__ import annotations

from collections.abc import Sequence

from checks.check import FAULT, OK, WARNING, Check, judged
from model_args import ModelArgs
from tokenizer import Tokenizer

LEAST_BYTES = 1.7  # UTF-8 bytes a token; below, most tokens are single bytes
MOST_UNKNOWN = 1e-3
# A family of tokenizers, by a special token and the number of ids -> the bases of its models' rotary encoding
THETAS = (
    ("LLaMA 3", "<|begin_of_text|>", (128_000, 129_000), (5e5,)),
    ("Qwen2 and later", "<|im_start|>", (151_640, 152_100), (1e6, 5e6)),
    ("LLaMA 2", "<s>", (32_000, 32_000), (1e4, 1e6)),  # 1e6: Mistral 0.2 and CodeLlama have its vocabulary
)


def suits(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Check]:
    """Return how well a tokenizer writes some texts: bytes a token, characters that it does not know, the way back."""
    ids = [tokenizer.encode(text) for text in texts]
    n_ids, n_bytes = max(1, sum(map(len, ids))), sum(len(text.encode()) for text in texts)
    unknown = sum(each.count(tokenizer.unk_id) for each in ids) / n_ids if tokenizer.unk_id is not None else 0.0
    lost = [text for text, each in zip(texts, ids) if tokenizer.decode(each) != text]
    train = "train a tokenizer on these texts (train_tokenizer.py), or choose one for their language"
    rate = n_bytes / n_ids
    found = f"{rate:.2f} bytes ({sum(map(len, texts)) / n_ids:.2f} characters) a token"
    back = f"{len(texts) - len(lost)} of {len(texts)} texts come back unchanged"
    return [
        judged("tokenizer suits the text", f"{LEAST_BYTES} bytes a token or more", found, train, rate < LEAST_BYTES),
        judged("unknown tokens", "below 0.1 %", f"{unknown:.2%}".replace("%", " %"), train, unknown > MOST_UNKNOWN),
        judged("text, ids, text", "texts come back", back, f"{train}; lost: {lost[:1]!r:.60}", bool(lost), WARNING),
    ]


def fits(tokenizer: Tokenizer, args: ModelArgs) -> list[Check]:
    """Return whether a tokenizer's ids, eos and family go with a model's shape."""
    n, rows = tokenizer.vocab_size, args.vocab_size
    found = f"{n:,} ids for {rows:,} rows"
    another = "use the tokenizer that the model was trained with, or pretrain.py --init_from, which adds rows"
    checks = [judged("vocabulary", "no more ids than rows of the embedding", found, another, n > rows)]
    if checks[0].level == OK and rows - n > max(1024, 0.05 * rows):
        checks = [Check(WARNING, "vocabulary", "about as many ids as rows", found, another)]
    ends = "none" if tokenizer.eos_id is None else f"id {tokenizer.eos_id}"
    advice = "add an eos_token to tokenizer_config.json: without one documents run into each other"
    checks.append(judged("eos", "a token that ends a document", ends, advice, tokenizer.eos_id is None, FAULT))
    for family, token, (least, most), thetas in THETAS:
        if token in tokenizer.special and least <= n <= most:
            names = " or ".join(f"{theta:g}" for theta in thetas)
            advice = f"set rope_theta in config.json to that of the model's card ({names} for {family})"
            found = f"rope_theta {args.rope_theta:g}"
            wrong = args.rope_theta not in thetas
            checks.append(judged("rope_theta", f"{names}, as models of {family} have", found, advice, wrong, WARNING))
            break
    return checks

"""Small vocabularies of every kind, real ones where they lie beside the checkout, and texts that break tokenizers."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

import train_tokenizer
from tokenizer import MARKERS, SentencePieceTokenizer, Tokenizer, load_tokenizer

LINES = [
    "雨停了，石阶上还有水。",
    "我们把旧书搬到窗下，一本一本晒。",
    "他说：“明天再来吧！”",
    "  the rain stopped,  and the steps were still wet.",
    "We carried the old books to the window and let them dry.",
    "for i in range(10):    print(i * 37, 'ok')",
    "a -- b ---- c ======== d ... e ........",
] * 3

# Text made of what breaks tokenizers: both scripts, control characters, emoji (with joiners), combining marks, runs of
# spaces and signs, full-width signs, digits, U+FFFD, SentencePiece's own marks, and the names of special tokens.
# Not U+2581: SentencePiece writes a space so, and a text's own comes back as a space. Not what chat templates refuse.
WORDS = "雨 停了 ， 。 “ ！ Ａ ㈱ the rain ed philosophy é e\u0301 ﬁ ß Ж 1 2024 - = . < > | {{ %} </ \ufffd \u2585 ⁇"
BLANKS = [
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " ",
    "  ",
    "     ",
    " the",
    "\u3000",
    "\xa0",
    "\x85",
    "\u200b",
    "\u2028",
    "\ufeff",
]
SNIPPETS = st.sampled_from(
    [*WORDS.split(), *BLANKS, "😀", "👩\u200d👧", "𠀀", "<0x0A>", "\x00", "\x01", "\x1b", "\x7f"]
)
NAMES = st.sampled_from(["<s>", "</s>", "<unk>", "<pad>", *MARKERS, "[gMASK]", "sop", "<|im_start|>", "<|eot|>"])
WILD = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\ufdd0\ufdd1\ufdd2")
REPEATED = st.builds(lambda s, n: s * n, SNIPPETS, st.integers(1, 9))
TEXT = st.lists(st.one_of(SNIPPETS, REPEATED, WILD), max_size=14).map("".join)
TEXT_WITH_NAMES = st.lists(st.one_of(SNIPPETS, NAMES, WILD), max_size=14).map("".join)
FUZZ = settings(max_examples=150, deadline=None)


def sp_model(**changes) -> bytes:
    """A small SentencePiece model with the trainer's own defaults, changed."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=out,
        minloglevel=2,
        **({"model_type": "bpe", "vocab_size": 200} | changes),
    )
    return out.getvalue()


def write_byte_level(directory: Path) -> Path:
    """A byte-level BPE as Llama 3 and Qwen have it: split by their expression, special and merely added tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE())
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    split += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    special = [AddedToken(t, special=True, normalized=False) for t in ("<|eot|>", "<|im_start|>", "<|im_end|>")]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot|>", "pad_token": {"content": "<|eot|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_metaspace(directory: Path, ignore_merges: bool = False) -> Path:
    """A SentencePiece-style tokenizer.json without byte fallback, whose eos lies among the ordinary pieces."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = {piece: i for i, piece in enumerate(["<unk>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab", "雨"])}
    merges = [("a", "b"), ("\u2581", "ab")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if ignore_merges else "always")
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return SentencePieceTokenizer(train_tokenizer.train_model(LINES, 1.0, train_tokenizer.Args(vocab_size=420)))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def llama(request) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue("shared") / "tokenizers/llama_tokenizer.model")


@pytest.fixture(scope="module")
def chatglm2(request) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue("shared") / "tokenizers/chatglm2_tokenizer.model")


@pytest.fixture(scope="module")
def stories(request) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue("shared") / "models/stories260K_hf")


ALL = ["ours", "byte_level", "llama", "chatglm2", "stories"]

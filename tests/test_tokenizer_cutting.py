"""A long text is cut where its ids stay the same: compared with the same text in one piece."""

import json
import pickle

import pytest
import tokenizers
from helpers.vocabularies import FUZZ, LINES, SNIPPETS, write_byte_level
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from tokenizer import HuggingFaceTokenizer, cutting, huggingface, load_tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
METASPACE = {"always": True, "first": True, "first, uncut": False, "never": True}


def write(directory, kind: str):
    """A small tokenizer.json of this kind."""
    byte_level = kind in SPLITS or kind == "byte level"
    backend = tokenizers.Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>", fuse_unk=True))
    if kind == "prepended":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif byte_level:
        split = pre_tokenizers.Split(tokenizers.Regex(SPLITS[kind]), "isolated") if kind in SPLITS else None
        level = pre_tokenizers.ByteLevel(add_prefix_space=not split, use_regex=not split)
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    else:
        scheme = kind.partition(",")[0]
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", scheme, split=METASPACE[kind])
    backend.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else list("\u2581abcdefgh，。的")
    given = {"special_tokens": [] if byte_level else ["<unk>"], "initial_alphabet": alphabet, "show_progress": False}
    words = " ".join(LINES).replace(",", "").split(" ")  # pieces never hold a space behind another character
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=420, **given))
    backend.add_special_tokens([AddedToken("<|eot|>", special=True, normalized=False)])
    backend.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


SPLITS = {"gpt2": GPT2, "qwen": QWEN, "llama 3": LLAMA3, "o200k": O200K}
KINDS = [*SPLITS, "byte level", *METASPACE, "prepended"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> HuggingFaceTokenizer:
    return write(tmp_path_factory.mktemp("kind"), request.param)


@pytest.fixture
def short_parts(monkeypatch):
    """Cut wherever a text can be cut."""
    for module in (cutting, huggingface):
        monkeypatch.setattr(module, "PART", 1)


WORDS = st.sampled_from(
    ["the", " rain", " a", "I", "'s", " ", "  ", "，", "。", "雨", " 停了", "é", "e\u0301", "\n", "7"]
)


@given(words=st.lists(st.one_of(WORDS, SNIPPETS), max_size=24), after=st.booleans())
@FUZZ
def test_a_text_in_parts_has_the_ids_of_the_whole(tokenizer, words, after):
    text = "".join(words)
    ids, (_, spans) = tokenizer.encode(text, after), tokenizer.encode_spans(text, after)
    with pytest.MonkeyPatch.context() as patch:
        for module in (cutting, huggingface):
            patch.setattr(module, "PART", 1)
        assert tokenizer.encode(text, after) == ids
        assert tokenizer.encode_spans(text, after)[1].tolist() == spans.tolist()


def test_every_kind_is_cut_at_spaces_and_where_it_can_be_at_punctuation(tokenizer, short_parts):
    tokenizer.encode("the rain")  # longer than two parts of one character
    assert tokenizer._boundary is not None
    parts = [part for _, part in cutting.parts_of("the rain  stopped 雨停了", tokenizer._boundary)]
    assert parts[:2] == ["the", " rain  stopped"]
    assert pickle.loads(pickle.dumps(tokenizer)).encode("the rain") == tokenizer.encode("the rain")


def test_what_looks_further_is_not_cut(tmp_path, ours, short_parts):
    def boundary_of(tokenizer):
        return cutting.find_boundary(json.loads(tokenizer._backend.to_str()), tokenizer._backend)

    assert boundary_of(load_tokenizer(write_byte_level(tmp_path))) is not None
    for flags in ({"content": "a b"}, {"content": "rain", "lstrip": True}, {"content": "rain", "single_word": True}):
        backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        backend.add_tokens([AddedToken(**{"normalized": False} | flags)])
        backend.save(str(tmp_path / "tokenizer.json"))
        assert boundary_of(load_tokenizer(tmp_path)) is None
        write_byte_level(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"\A +"}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    assert boundary_of(load_tokenizer(tmp_path)) is None
    vocab = {"<unk>": 0, "\u2581": 1, "a": 2, "a\u2581": 3}
    across = tokenizers.Tokenizer(models.BPE(vocab, [("a", "\u2581")], unk_token="<unk>"))
    across.normalizer, across.decoder = normalizers.Replace(" ", "\u2581"), decoders.Metaspace()
    across.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert boundary_of(tokenizer) is None and tokenizer.encode("a a a") == [3, 3, 2]


def test_one_enormous_line_has_its_ids(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    text = "the rain stopped and " * 40_000  # several parts of the usual size
    assert len(text) > 4 * cutting.PART
    assert tokenizer.encode(text) == tokenizer._backend.encode(text, add_special_tokens=False).ids


def test_real_tokenizers_in_parts(shared, tmp_path, short_parts):
    llama = load_tokenizer(shared / "tokenizers/llama_tokenizer.model")
    llama.save(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    for file in ("zh_classic_novels.txt", "en_books_cc0.txt"):
        text = (shared / "pretrain" / file).read_text(encoding="utf8")[200_000:230_000]
        assert tokenizer.encode(text) == llama.encode(text)
    assert tokenizer._boundary is not None

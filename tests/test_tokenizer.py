"""Tokenizers against sentencepiece, tokenizers and transformers: ids are equal or they are wrong."""

import codecs
import json
import pickle

import pytest
import tokenizers
import transformers
from helpers.vocabularies import (
    ALL,
    FUZZ,
    LINES,
    SNIPPETS,
    TEXT,
    TEXT_WITH_NAMES,
    sp_model,
    write_byte_level,
    write_metaspace,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

import train_tokenizer
from tokenizer import MARKERS, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer


@pytest.fixture(scope="module", params=ALL)
def any_tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pair(any_tokenizer, tmp_path_factory) -> tuple[Tokenizer, transformers.PreTrainedTokenizerBase]:
    """A tokenizer and what transformers makes of its saved directory, with a model's config.json in it."""
    directory = tmp_path_factory.mktemp("saved")
    any_tokenizer.save(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return any_tokenizer, transformers.AutoTokenizer.from_pretrained(directory)


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(map(tokenizer.id_to_bytes, ids))


# --- bytes


@pytest.mark.parametrize("name", ["ours", "byte_level"])
@given(text=TEXT_WITH_NAMES)
@FUZZ
def test_bytes_of_the_ids_are_the_bytes_of_the_text(name, request, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert joined(tokenizer, ids) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())


@pytest.mark.parametrize("name", ["llama", "chatglm2"])
@given(text=TEXT_WITH_NAMES)
@FUZZ
def test_a_dummy_prefix_is_one_space_more_and_decode_takes_it_away(name, request, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert tokenizer.dummy_prefix
    assert joined(tokenizer, ids) == (b" " + text.encode() if text else b"")
    assert tokenizer.decode(ids) == text == tokenizer._processor.decode(ids)


def test_our_ids_stand_where_they_should(ours):
    assert [ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id] == [0, 1, 2, 3]
    assert [ours.special_id(piece) for piece in MARKERS] == [4, 5, 6, 7]
    assert ours.special_id("rain") is None and not ours.dummy_prefix
    assert ours.vocab_size == len(ours.token_bytes()) == 420
    assert ours.token_bytes()[:8].sum() == 0 and (ours.token_bytes()[8:] > 0).all()
    assert ours.encode("") == [] and len(ours.encode("\n")) == 1 and len(ours.encode("2024")) == 4


def test_specials_decode_to_nothing_or_to_their_names(ours, byte_level):
    for tokenizer, name in ((ours, "<|user|>"), (byte_level, "<|im_end|>")):
        ids = [tokenizer.special_id(name), *tokenizer.encode("雨 停")]
        assert tokenizer.decode(ids) == "雨 停"
        assert tokenizer.decode(ids, skip_special=False) == f"{name}雨 停"
    tool = byte_level._backend.token_to_id("<tool>")  # added but not special: it is text, wherever it stands
    assert byte_level.id_to_bytes(tool) == b"<tool>" and tool in byte_level.encode("a<tool>b")


def test_a_stream_that_waits_for_whole_characters_gives_the_text(any_tokenizer):
    text = "雨停了😀𠀀 é\nthe end"
    pieces = [*codecs.iterdecode(map(any_tokenizer.id_to_bytes, any_tokenizer.encode(text)), "utf8")]
    assert "".join(pieces).removeprefix(" " * any_tokenizer.dummy_prefix) == text
    assert "\ufffd" in any_tokenizer.decode(any_tokenizer.encode("𠀀")[:-1])


def test_sentencepiece_space_sign_becomes_a_space(ours):
    assert ours.decode(ours.encode("a\u2581b")) == "a b"


def test_chatglm2_has_five_special_tokens_behind_its_model(chatglm2):
    assert chatglm2.vocab_size == 64794 and chatglm2.pad_id == chatglm2.unk_id == 0
    assert [chatglm2.special_id(t) for t in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")] == [*range(64789, 64794)]
    assert chatglm2.decode([64790, 64792, *chatglm2.encode("你好")]) == "你好"


# --- special tokens in a text are text, and equal ids in transformers


@given(text=TEXT_WITH_NAMES)
@FUZZ
def test_transformers_reads_the_same_ids_when_told_that_names_are_text(pair, text):
    tokenizer, theirs = pair
    assert theirs(text, split_special_tokens=True).input_ids == [*tokenizer.begins, *tokenizer.encode(text)]


@given(text=TEXT)
@FUZZ
def test_transformers_reads_the_same_ids_and_writes_the_same_text(pair, text):
    tokenizer, theirs = pair
    ids = tokenizer.encode(text)
    assert theirs(text).input_ids == [*tokenizer.begins, *ids]
    assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_transformers_knows_the_special_tokens(pair):
    tokenizer, theirs = pair
    assert len(theirs) == tokenizer.vocab_size
    ours = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id]
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id] == ours
    assert theirs.convert_tokens_to_ids([*tokenizer.special]) == [*tokenizer.special.values()]


@pytest.mark.parametrize("name", ["llama", "chatglm2", "stories"])
def test_tokenizer_json_equals_sentencepiece_on_real_text(name, request, shared, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path)
    converted = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    for file in ("zh_classic_novels.txt", "en_books_cc0.txt", "wikitext2_valid.txt"):
        text = (shared / "pretrain" / file).read_text(encoding="utf8")[200_000:320_000]
        pieces = [text[i : i + 997] for i in range(0, len(text), 997)]
        assert [*map(converted.encode, pieces)] == [*map(tokenizer.encode, pieces)]


IDENTITY = {"normalization_rule_name": "identity"}
SETTINGS = {
    "spaces": IDENTITY | {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "across words": IDENTITY | {"split_by_whitespace": False, "add_dummy_prefix": False},
    "bytes": IDENTITY | {"byte_fallback": True, "vocab_size": 420},
    "nfkc": {"normalization_rule_name": "nfkc"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def converted(request, tmp_path_factory) -> tuple[Tokenizer, Tokenizer]:
    """A SentencePiece model of other settings than ours, and the tokenizer.json made of it."""
    tokenizer = SentencePieceTokenizer(sp_model(**SETTINGS[request.param]))
    directory = tmp_path_factory.mktemp("converted")
    tokenizer.save(directory)
    return tokenizer, HuggingFaceTokenizer(directory / "tokenizer.json")


# Only SNIPPETS: of NFKC, the tokenizers library drops a mark that follows a ligature, and SentencePiece keeps it.
@given(text=st.lists(SNIPPETS, max_size=14).map("".join))
@FUZZ
def test_tokenizer_json_equals_sentencepiece_whatever_its_settings(converted, text):
    tokenizer, same = converted
    assert same.encode(text) == tokenizer.encode(text)


# --- files


def test_saved_and_loaded_again_it_is_the_same(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "new" / "one")
    again = load_tokenizer(tmp_path / "new" / "one")
    assert type(again) is type(any_tokenizer) and again.sha256() == any_tokenizer.sha256()
    for a in (again, pickle.loads(pickle.dumps(any_tokenizer))):
        assert a.special == any_tokenizer.special and a.eos_id == any_tokenizer.eos_id
        text = "the rain 雨停了 </s><|im_end|>"
        assert a.encode(text) == any_tokenizer.encode(text)
    again.save(tmp_path / "two")
    for file in (tmp_path / "two").iterdir():
        assert file.read_bytes() == (tmp_path / "new" / "one" / file.name).read_bytes()


def test_the_identity_is_of_the_ids_not_of_the_file(ours, byte_level, tmp_path):
    ours.save(tmp_path)
    assert HuggingFaceTokenizer(tmp_path / "tokenizer.json").sha256() == ours.sha256() != byte_level.sha256()
    other = SentencePieceTokenizer(train_tokenizer.train_model(LINES[1:3], 1.0, train_tokenizer.Args(vocab_size=300)))
    assert other.sha256() != ours.sha256()


def test_tokens_added_by_transformers_are_not_lost(ours, tmp_path):
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    theirs.save_pretrained(tmp_path)  # over the old files: tokenizer.model is still the old one
    again = load_tokenizer(tmp_path)
    assert again.special_id("<|tool|>") == ours.vocab_size == again.vocab_size - 1
    assert again.encode("雨停了<|tool|>") == ours.encode("雨停了<|tool|>")
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").is_file()
    assert load_tokenizer(tmp_path / "copy").special == again.special


def test_a_hugging_face_directory_keeps_its_own_settings(tmp_path):
    directory = write_byte_level(tmp_path / "theirs")
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    )
    (directory / "chat_template.jinja").write_text("{{ 'theirs' }}")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.bos_id == tokenizer.special_id("<|im_start|>")
    assert tokenizer.eos_id == tokenizer.pad_id == tokenizer.special_id("<|eot|>")  # tokenizer_config.json counts more
    tokenizer.save(tmp_path / "copy")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == "{{ 'theirs' }}"
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").unlink()
    bare = load_tokenizer(directory / "tokenizer.json")
    assert (bare.bos_id, bare.eos_id, bare.pad_id, bare.unk_id) == (None, None, None, None)
    bare.save(tmp_path / "bare")
    assert load_tokenizer(tmp_path / "bare").encode("the rain") == bare.encode("the rain")


def test_truncation_and_padding_written_in_a_file_do_not_apply(tmp_path):
    directory = write_byte_level(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(directory / "tokenizer.json"))
    assert load_tokenizer(directory).decode(load_tokenizer(directory).encode("the rain stopped")) == "the rain stopped"


def test_metaspace_and_its_bytes(tmp_path):
    tokenizer = load_tokenizer(write_metaspace(tmp_path))
    assert tokenizer.dummy_prefix and tokenizer.decode(tokenizer.encode("ab 雨 ab")) == "ab 雨 ab"
    assert joined(tokenizer, tokenizer.encode("ab")) == b" ab"
    assert tokenizer.encode("?")[-1] == tokenizer.unk_id == 0 and tokenizer.id_to_bytes(0) == b""


def test_what_cannot_be_loaded_is_said_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*: no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such tokenizer \(and no \.model there\)"):
        load_tokenizer(tmp_path)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1", sp_model()[:900]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": "\xff"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not UTF-8 text"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    write_byte_level(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["model"]["continuing_subword_prefix"] = "[a"  # the library panics
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"read here: pieces with a continuing_subword_prefix, '\[a'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    whole = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words = tokenizers.Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    words.decoder = decoders.BPEDecoder()
    for backend, error in (
        (whole, "expected a BPE or Unigram model, found WordLevel"),
        (words, "expected a decoder ByteLevel, .*, found BPEDecoder"),
    ):
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=error):
            load_tokenizer(tmp_path)


def test_a_model_that_finds_special_tokens_in_plain_text_is_refused(tmp_path):
    # With ignore_merges a whole word that is in the vocabulary is one id, and here </s> is such a word.
    with pytest.raises(ValueError, match="reads </s> in plain text as special"):
        load_tokenizer(write_metaspace(tmp_path, ignore_merges=True))


def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="only SentencePiece models of type BPE or unigram"):
        SentencePieceTokenizer(sp_model(model_type="char", vocab_size=90)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@FUZZ
@given(texts=st.lists(TEXT, max_size=4))
def test_many_texts_have_the_ids_of_each(any_tokenizer, texts):
    found = any_tokenizer.encode_all(texts)
    assert [ids.tolist() for ids in found] == [any_tokenizer.encode(text) for text in texts]


def test_a_surrogate_among_many_texts_is_named(any_tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        any_tokenizer.encode_all(["whole", "half \ud800"])


def test_what_cannot_be_encoded_or_decoded(ours, byte_level):
    for tokenizer in (ours, byte_level):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            tokenizer.encode("half a pair: \ud83d")
        with pytest.raises(ValueError, match="0 or more, found -1"):
            tokenizer.decode([-1])
        assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("a"), 10**6]).strip() == "a"  # padding


def test_a_damaged_piece_of_a_model_is_one_sentence():
    model = sp_model(byte_fallback=True, vocab_size=400)
    assert model.count(b"<0x99>") == 1
    with pytest.raises(ValueError, match="is a damaged SentencePiece model"):
        SentencePieceTokenizer(model.replace(b"<0x99>", b"<0x99."))

"""Tokens beside a SentencePiece model, its user-defined pieces, and saving tried beforehand, against transformers."""

import json
import pickle

import pytest
import sentencepiece
import transformers
from helpers.vocabularies import FUZZ, SNIPPETS, sp_model, write_byte_level
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from chat.template import load_template
from tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, check_saving, load_tokenizer

SIZE = 420
# As LLaMA's: nothing of a text is changed.
LLAMA = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "vocab_size": SIZE,
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKERS = {"<|im_start|>": SIZE, "<|im_end|>": SIZE + 1}
CHAT = [{"role": "user", "content": "the rain 雨停了"}, {"role": "assistant", "content": "ed  the"}]


def token(content: str, **flags: bool) -> dict:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **plain, "special": True} | flags


def write_llama(directory, added: dict, *, as_file: bool = False, **config):
    """A directory with a tokenizer.model and tokens beside it, in one of the two files; `added`: id -> token."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(sp_model(**LLAMA))
    said = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, "chat_template": CHATML}
    said |= {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"} | config
    own = {0: token("<unk>"), 1: token("<s>"), 2: token("</s>")}
    if as_file:
        (directory / "added_tokens.json").write_text(json.dumps({each["content"]: i for i, each in added.items()}))
        said["additional_special_tokens"] = [each["content"] for each in added.values() if each["special"]]
    else:
        said["added_tokens_decoder"] = {str(i): each for i, each in (own | added).items()}
    (directory / "tokenizer_config.json").write_text(json.dumps(said))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return directory


SPECIAL = {i: token(name) for name, i in MARKERS.items()}
MIXED = SPECIAL | {
    SIZE + 2: token("<tool>", special=False),
    SIZE + 3: token("<|end|>"),
    SIZE + 4: token("rain", special=False),
}
KINDS = {
    "special": (SPECIAL, {}),
    "not legacy": (SPECIAL, {"legacy": False}),
    "added_tokens.json": (SPECIAL, {"as_file": True}),
    "mixed": (MIXED, {}),
    "mixed, not legacy": (MIXED, {"legacy": False}),
    "mixed, added_tokens.json": (MIXED, {"as_file": True}),
    "strips": (SPECIAL | {SIZE + 1: token("<|im_end|>", rstrip=True, lstrip=True)}, {}),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> tuple[Tokenizer, transformers.PreTrainedTokenizerBase]:
    """A directory with tokens beside a .model, as we and as transformers read it."""
    added, config = KINDS[request.param]
    directory = write_llama(tmp_path_factory.mktemp("llama"), added, **config)
    return load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)


def test_tokens_beside_a_model_have_their_ids(pair):
    tokenizer, theirs = pair
    assert tokenizer.vocab_size == len(theirs)
    added = {i: each for i, each in theirs.added_tokens_decoder.items() if i >= SIZE}
    assert added.keys() >= set(MARKERS.values())
    for i, each in added.items():
        assert (tokenizer.special_id(each.content) == i) == each.special
        assert tokenizer.decode([i], skip_special=False) == each.content
    assert [tokenizer.bos_id, tokenizer.eos_id] == [theirs.bos_token_id, theirs.eos_token_id]
    check_saving(tokenizer)


# No text begins with a space or holds two: there, LlamaTokenizer of transformers differs from SentencePiece.
WORDS = st.sampled_from(["the", " rain", "雨停了", " ed", "😀", "\n", "x1", "<|im_end|>"])


@given(text=st.lists(WORDS, max_size=9).map("".join).map(str.strip))
@FUZZ
def test_a_text_beside_added_tokens_has_the_ids_of_transformers(pair, text):
    tokenizer, theirs = pair
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids


@given(parts=st.lists(st.sampled_from(["<tool>", "the", " the", "雨停了", "rain", "\n"]), max_size=7))
@FUZZ
def test_tokens_that_are_not_special_are_found_in_texts(pair, parts):
    tokenizer, theirs = pair
    text = "".join(parts).strip()
    ids = tokenizer.encode(text)
    assert ids == theirs(text, add_special_tokens=False).input_ids
    if "<tool>" in tokenizer.added:
        assert ids.count(SIZE + 2) == text.count("<tool>") and ids.count(SIZE + 4) == text.count("rain")


def test_a_conversation_has_the_ids_of_transformers(pair):
    tokenizer, theirs = pair
    ids, _ = load_template(tokenizer).encode(CHAT)
    assert ids == theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert ids.count(tokenizer.eos_id) == 2


def test_saved_they_are_kept(pair, tmp_path):
    tokenizer, theirs = pair
    tokenizer.save(tmp_path)
    again, copy = load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.sha256() == copy.sha256() == tokenizer.sha256() and again.strips == tokenizer.strips
    ids, _ = load_template(tokenizer).encode(CHAT)
    assert load_template(again).encode(CHAT)[0] == load_template(copy).encode(CHAT)[0] == ids
    assert saved.apply_chat_template(CHAT, tokenize=True, return_dict=False) == ids
    assert saved("the <tool> rain").input_ids == [*tokenizer.begins, *tokenizer.encode("the <tool> rain")]
    for i, each in theirs.added_tokens_decoder.items():
        same = saved.added_tokens_decoder[i]
        assert (same.content, same.special) == (each.content, each.special)
        assert i < SIZE or (same.lstrip, same.rstrip) == (each.lstrip, each.rstrip)


def test_a_piece_of_the_model_that_is_renamed_keeps_its_id(tmp_path):
    directory = write_llama(tmp_path, {SIZE - 1: token("<|im_start|>"), SIZE: token("<|im_end|>")})
    tokenizer = load_tokenizer(directory)
    piece = SentencePieceTokenizer(sp_model(**LLAMA)).decode([SIZE - 1])
    assert tokenizer.vocab_size == SIZE + 1 and tokenizer.special_id("<|im_start|>") == SIZE - 1
    assert SIZE - 1 not in tokenizer.encode(piece)
    check_saving(tokenizer)


def test_ids_with_a_gap_stay_where_they_are(tmp_path):
    directory = write_llama(tmp_path, {SIZE + 5: token("<|im_end|>"), SIZE + 9: token("<tool>", special=False)})
    tokenizer = load_tokenizer(directory)
    assert tokenizer.vocab_size == SIZE + 10 and tokenizer.eos_id == SIZE + 5
    assert SIZE + 9 in tokenizer.encode("a <tool>") and tokenizer.decode([SIZE + 2]) == ""
    check_saving(tokenizer)


def test_tokens_that_only_the_config_beside_a_tokenizer_json_names(tmp_path):
    directory = write_byte_level(tmp_path)
    size = load_tokenizer(directory).vocab_size
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["pad_token"] = "<|eot|>"
    config["added_tokens_decoder"] = {str(size): token("<|tool|>"), str(size + 1): token("<look>", special=False)}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.vocab_size == len(theirs) == size + 2 and tokenizer.special_id("<|tool|>") == size
    text = "the <look> rain"
    assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
    check_saving(tokenizer)
    config["added_tokens_decoder"] = {str(size + 7): token("<|tool|>")}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"gives '<\|tool\|>' the id {size + 7}, and the next free id .* is {size}"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({3: token("<tool>", special=False)}, r"'<tool>' has the id 3, which is the id of '<0x00>'"),
        ({SIZE: token("<0x00>", special=False)}, r"'<0x00>' has the id 420, which is 3 in the model"),
        ({2**32 - 1: token("<|x|>")}, "the id of a token should be a number from 0 to 16,777,215, found 4294967295"),
        ({"one": token("<|x|>")}, "the id of a token should be a number .*, found 'one'"),
        ({SIZE: {"special": True}}, r"added_tokens_decoder 420 should be a text, or an object with a text as content"),
        ({SIZE: token("<|x|>"), SIZE + 1: token("<|x|>")}, r"the token '<\|x\|>' has two ids"),
        ({SIZE: token("<0x01>")}, "has the piece '<0x01>' at 4, and the files beside it say 420"),
    ],
)
def test_tokens_that_do_not_fit_are_named(tmp_path, added, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write_llama(tmp_path, added))


# --- user-defined pieces

OWN = ("<|im_start|>", "<|im_end|>", "<|im", "==")
SETTINGS = {
    "llama": LLAMA,
    "spaces removed": LLAMA | {"remove_extra_whitespaces": True},
    "no space before texts": LLAMA | {"add_dummy_prefix": False},
    "runs of spaces": LLAMA | {"user_defined_symbols": ["▁▁", "▁▁▁▁", "\n", *OWN], "add_dummy_prefix": False},
    "nfkc": LLAMA | {"normalization_rule_name": "nfkc"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def own_pieces(request, tmp_path_factory):
    """A model with user-defined pieces, as sentencepiece and as transformers reads it once it is saved."""
    model = sp_model(**{"user_defined_symbols": [*OWN]} | SETTINGS[request.param])
    directory = tmp_path_factory.mktemp("own")
    tokenizer = SentencePieceTokenizer(model)
    check_saving(tokenizer)
    tokenizer.save(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return sentencepiece.SentencePieceProcessor(model_proto=model), theirs, load_tokenizer(directory)


@given(text=st.lists(st.one_of(SNIPPETS, st.sampled_from(OWN)), max_size=9).map("".join))
@FUZZ
def test_user_defined_pieces_are_one_id_wherever_they_stand(own_pieces, text):
    sp, theirs, ours = own_pieces
    ids = theirs(text, add_special_tokens=False).input_ids
    if text.strip() not in OWN:  # one such piece alone has no space before it in a tokenizer.json
        assert ids == sp.encode(text) == ours.encode(text)
    assert ids.count(sp.piece_to_id("<|im_end|>")) == text.count("<|im_end|>")


def test_a_user_defined_piece_that_the_config_calls_special_never_comes_from_a_text(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sp_model(**LLAMA, user_defined_symbols=[*OWN]))
    i = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).piece_to_id("<|im_end|>")
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": {str(i): token("<|im_end|>")}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == i and i not in tokenizer.encode("a<|im_end|>")
    check_saving(tokenizer)


# --- saving is tried


def test_what_cannot_be_saved_is_said_by_trying(ours, byte_level, tmp_path):
    check_saving(ours)
    check_saving(byte_level)
    for changes, message in (
        ({"model_type": "char", "vocab_size": 90}, "only SentencePiece models of type BPE"),
        ({"treat_whitespace_as_suffix": True}, "only SentencePiece models of type BPE"),
        ({"user_defined_symbols": ["①"], "normalization_rule_name": "nfkc"}, "changes its user-defined piece '①'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_saving(SentencePieceTokenizer(sp_model(**changes)))


def test_a_difference_after_saving_is_seen(ours, monkeypatch):
    monkeypatch.setattr(HuggingFaceTokenizer, "encode", lambda self, text, follows_special=False: [10**6])
    with pytest.raises(ValueError, match="cannot be saved, because transformers would read other ids of 'the rain'"):
        check_saving(ours)


def test_special_flags_are_those_of_the_library():
    assert AddedToken("x", special=True).normalized is False  # the default that added_tokens.json relies on

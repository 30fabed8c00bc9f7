"""Unigram models of SentencePiece: ids of sentencepiece, of the saved directory, and of transformers are equal."""

import json

import pytest
import sentencepiece
import tokenizers
import transformers
from helpers.vocabularies import FUZZ, LINES, NAMES, SNIPPETS, WILD, sp_model
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders, models

from tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, check_saving, load_tokenizer

UNIGRAM = {"model_type": "unigram", "vocab_size": 400, "hard_vocab_limit": False}
IDENTITY = {"normalization_rule_name": "identity"}
BYTES = {"byte_fallback": True}
OWN = ("<|im_start|>", "<|im_end|>", "<|im", "==", "石阶上还有水", "【问】", "the")
SETTINGS = {
    "nmt_nfkc": {},
    "identity": IDENTITY,
    "bytes": IDENTITY | BYTES,
    "bytes and nmt_nfkc": BYTES,
    "spaces kept": IDENTITY | BYTES | {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "no space before texts": IDENTITY | {"add_dummy_prefix": False},
    "across words": IDENTITY | {"split_by_whitespace": False},
    "own pieces": IDENTITY | {"user_defined_symbols": [*OWN]},
    "own pieces, bytes": BYTES | {"user_defined_symbols": [*OWN]},
    "control pieces": IDENTITY | BYTES | {"control_symbols": ["<|im_start|>", "<|im_end|>", "[gMASK]"]},
}
TEXT = st.lists(st.one_of(SNIPPETS, st.sampled_from(OWN), NAMES, st.sampled_from(LINES)), max_size=12).map("".join)


@pytest.fixture(scope="module", params=SETTINGS)
def triple(request, tmp_path_factory):
    """A model as sentencepiece, as its saved directory, and as transformers reads it."""
    model = sp_model(**UNIGRAM | SETTINGS[request.param])
    directory = tmp_path_factory.mktemp("unigram")
    tokenizer = SentencePieceTokenizer(model)
    check_saving(tokenizer)
    tokenizer.save(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return sentencepiece.SentencePieceProcessor(model_proto=model), load_tokenizer(directory), theirs


def assert_as_good(sp: sentencepiece.SentencePieceProcessor, ids: list[int], expected: list[int]) -> None:
    """Ids are the expected ones, or another order of them whose score is the same: "--", "-" and "-", "--"."""
    assert ids == expected or (sorted(ids) == sorted(expected) and sp.decode(ids) == sp.decode(expected))


@given(text=TEXT)
@FUZZ
def test_ids_are_those_of_sentencepiece_before_and_after_saving(triple, text):
    sp, ours, theirs = triple
    ids = sp.encode(text)
    assert ours.encode(text) == ids
    assert_as_good(sp, theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids, ids)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@given(text=st.lists(st.one_of(WILD, SNIPPETS), max_size=14).map("".join))
@FUZZ
def test_any_character_at_all(triple, text):
    sp, _, theirs = triple
    if not sp_charsmap(sp):  # the library drops some combining marks where a character map is applied
        assert_as_good(sp, theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids, sp.encode(text))


def sp_charsmap(sp: sentencepiece.SentencePieceProcessor) -> bytes:
    return ModelProto.FromString(sp.serialized_model_proto()).normalizer_spec.precompiled_charsmap


def test_the_unigram_model_of_chinese_llama(shared, tmp_path):
    model = shared / "tokenizers/chinese_llama_sp20k.model"
    sp, ours = sentencepiece.SentencePieceProcessor(model_file=str(model)), load_tokenizer(model)
    check_saving(ours)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs) == 20000 and ours.begins == [theirs.bos_token_id] == [1]
    odd = [
        "",
        " ",
        "\n\n",
        "a  b\t\x00c\x85",
        "😀👩\u200d👧",
        "<s>a</s><unk>",
        "ＡＢ①㈱",
        "</",
        "<0x0A>",
        "\u3000雨 停 了",
    ]
    for file in ("zh_classic_novels.txt", "wikitext2_valid.txt"):
        text = (shared / "pretrain" / file).read_text(encoding="utf8")[200_000:300_000]
        for piece in odd + [text[i : i + 197] for i in range(0, len(text), 197)]:
            ids = sp.encode(piece)
            assert ours.encode(piece) == ids
            assert theirs(piece, split_special_tokens=True).input_ids == [1, *ids]


@pytest.mark.parametrize("special", [True, False])
def test_tokens_beside_a_unigram_model(tmp_path, special):
    (tmp_path / "tokenizer.model").write_bytes(sp_model(**UNIGRAM, **IDENTITY, **BYTES))
    size = load_tokenizer(tmp_path).vocab_size
    tokens = {str(size + i): {"content": name, "special": special} for i, name in enumerate(OWN[:2])}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    tokenizer = load_tokenizer(tmp_path)
    check_saving(tokenizer)
    tokenizer.save(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.convert_tokens_to_ids([*OWN[:2]]) == [size, size + 1] and tokenizer.vocab_size == size + 2
    text = "雨<|im_start|>the<s><|im_end|>"
    assert (size in tokenizer.encode(text)) is not special
    assert theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids == tokenizer.encode(text)
    tokens[str(size + 9)] = {"content": "far", "special": special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    with pytest.raises(ValueError, match="'far' should have the id"):
        check_saving(load_tokenizer(tmp_path))


def with_pieces(*pieces: str, score: float = -5.0) -> SentencePieceTokenizer:
    proto = ModelProto.FromString(sp_model(**UNIGRAM, **IDENTITY))
    for piece in pieces:
        proto.pieces.add(piece=piece, score=score)
    return SentencePieceTokenizer(proto.SerializeToString())


def test_what_would_be_read_otherwise_is_refused():
    check_saving(with_pieces("<s", "un", "<0"))
    for pieces, score, message in (
        (("<s", "s>"), -5.0, "a text that contains '<s>' would be read otherwise"),
        (("rare",), 0.5, "a score above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_saving(with_pieces(*pieces, score=score))


def test_a_unigram_tokenizer_json_is_read_unless_texts_reach_its_special_tokens(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), ("a", -1.0), ("\u2581a", -1.5)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.unk_id == 0 and tokenizer.encode("\u2581aa?") == [4, 3, 0]
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="reads </s> in plain text as special tokens"):
        load_tokenizer(tmp_path)


def test_spans_are_those_of_the_text_before_its_normalisation():
    tokenizer = SentencePieceTokenizer(sp_model(**UNIGRAM, **BYTES))
    text = "雨停了，  ＡＢ the　雨。"
    ids, spans = tokenizer.encode_spans(text)
    assert ids == tokenizer.encode(text) and spans[-1].tolist() == [len(text) - 1, len(text)]
    written = {tokenizer.id_to_bytes(i).decode(): text[a:b] for i, (a, b) in zip(ids, spans) if b > a and i > 2}
    assert written[","] == "，" and written["雨"] == "雨" and written["。"] == "。"
    assert "".join(text[a:b] for a, b in spans) == text

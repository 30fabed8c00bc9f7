"""The ids of a text that is cut into words are those of SentencePiece, which gets the whole of it."""

import pickle

import pytest
from helpers.vocabularies import FUZZ, TEXT_WITH_NAMES, sp_model
from hypothesis import example, given
from sentencepiece import SentencePieceProcessor

from tokenizer import SentencePieceTokenizer, words

BPE = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "vocab_size": 420}
MODELS = {
    "bytes": sp_model(**BPE, byte_fallback=True),
    "no bytes": sp_model(**BPE | {"vocab_size": 250}),
    "no space before a text": sp_model(**BPE, byte_fallback=True, add_dummy_prefix=False),
    "own pieces": sp_model(**BPE, byte_fallback=True, user_defined_symbols=["  ", "\u2581the", "stopped,", "\n\n"]),
}


@pytest.mark.parametrize("name", MODELS)
@FUZZ
@given(TEXT_WITH_NAMES)
@example("")
@example(" ")
@example("a\u2581 b \u2581\u2581c\n \n\nd  the rain")
def test_words_have_the_ids_of_the_whole(name: str, text: str) -> None:
    ours, whole = SentencePieceTokenizer(MODELS[name]), SentencePieceProcessor(model_proto=MODELS[name])
    assert ours._words is not None
    for _ in range(2):  # computed, and as they were kept
        assert ours.encode(text) == whole.encode(text)


def test_a_model_whose_pieces_lie_across_words_is_not_cut() -> None:
    for changes in ({"model_type": "unigram"}, {"user_defined_symbols": ["a b"]}):
        model = sp_model(**BPE | {"byte_fallback": True, "vocab_size": 330} | changes)
        ours, text = SentencePieceTokenizer(model), "the rain stopped, and a b the steps were still wet."
        assert ours._words is None
        assert ours.encode(text) == SentencePieceProcessor(model_proto=model).encode(text)


def test_what_is_kept_is_bounded_and_sent_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = SentencePieceTokenizer(MODELS["bytes"])
    monkeypatch.setattr(words, "MOST", 3)
    for text in ("a b c d e f", "g " + "h" * 99):
        assert pickle.loads(pickle.dumps(ours)).encode(text) == ours.encode(text)
        assert 0 < len(ours._words) <= 3 and all(len(part) <= words.LONGEST for part in ours._words)

"""A trained vocabulary added to that of another tokenizer: the base stays, what it lacks is added."""

from pathlib import Path

import pytest
import sentencepiece
import transformers
from helpers.tokenizer_corpus import PROSE, TEXTS, VERSES, args

import train_tokenizer
from tokenizer import MARKERS, SentencePieceTokenizer, load_tokenizer
from train_tokenizer import SAMPLES, main


def small_base(directory: Path) -> Path:
    """A base like LLaMA's: dummy prefix, byte fallback, runs of spaces with a score of -1e9."""
    lines = ["the cat sat on the mat  and    sat", "the dog and the door"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "base"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path = directory / "base.model"
    proto = train_tokenizer.ModelProto.FromString(path.read_bytes())
    for p in proto.pieces:
        if p.type == p.NORMAL and not p.piece.strip("\u2581"):
            p.score = -1e9
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(params=["small", "llama"])
def base(request, tmp_path) -> Path:
    if request.param == "small":
        return small_base(tmp_path)
    return request.getfixturevalue("shared") / "tokenizers/llama_tokenizer.model"


def test_merging_keeps_the_base_and_adds_what_it_lacks(corpus, tmp_path, base):
    before = SentencePieceTokenizer(base.read_bytes())
    report = main(args(tmp_path, merge=base))
    merged = load_tokenizer(tmp_path / "tokenizer")
    assert report["vocab_size"] == merged.vocab_size > before.vocab_size
    for i in range(before.vocab_size):
        assert merged.id_to_bytes(i) == before.id_to_bytes(i)
    assert {piece: merged.special_id(piece) for piece in before.special} == before.special
    assert [merged.special_id(p) for p in ("<pad>", *MARKERS)] == [before.vocab_size + n for n in range(5)]
    assert (merged.bos_id, merged.eos_id, merged.pad_id) == (1, 2, before.vocab_size)
    # The base's own tokens of a text stay, or are joined further; never is one cut.
    for text in [*VERSES[:50], *SAMPLES.values(), "the cat  sat    on", ""]:
        ids = merged.encode(text)
        assert merged.decode(ids) == text and len(ids) <= len(before.encode(text))
        if all(i < before.vocab_size for i in ids):
            assert ids == before.encode(text)
    assert len(merged.encode(VERSES[0])) < len(before.encode(VERSES[0]))
    rates = report["characters_per_token"]
    assert rates[str(base)]["Chinese"] <= rates[str(tmp_path / "tokenizer")]["Chinese"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for text in [*TEXTS, *SAMPLES.values(), "  a    b ", "龘\x00😀<s>"]:
        assert theirs(text, split_special_tokens=True).input_ids == merged.encode(text)


def test_every_added_piece_has_a_score_of_its_own_below_the_base(corpus, tmp_path, base):
    main(args(tmp_path, merge=base))
    n = len(train_tokenizer.ModelProto.FromString(base.read_bytes()).pieces)
    pieces = train_tokenizer.ModelProto.FromString((tmp_path / "tokenizer" / "tokenizer.model").read_bytes()).pieces
    old = [p.score for p in pieces[:n] if p.type == p.NORMAL and p.score > -1e8]
    new = [p.score for p in pieces[n + 5 :]]
    assert new == sorted(set(new), reverse=True) and new[0] < min(old)


def test_merging_twice_adds_nothing(corpus, tmp_path, base):
    main(args(tmp_path, merge=base))
    once = tmp_path / "tokenizer" / "tokenizer.model"
    assert train_tokenizer.merge(once.read_bytes(), once.read_bytes()) == once.read_bytes()


def test_merging_into_a_unigram_model_is_refused(corpus, tmp_path):
    prefix = tmp_path / "unigram"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE * 5), model_prefix=str(prefix), vocab_size=34, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"--merge .*unigram\.model: expected a SentencePiece BPE model"):
        main(args(tmp_path, merge=prefix.with_suffix(".model")))
    assert not (tmp_path / "tokenizer").exists()

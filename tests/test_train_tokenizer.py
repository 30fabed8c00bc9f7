"""The tokenizer trainer: what it trains on, what it refuses, and that its models mean the same in transformers."""

import json
from pathlib import Path

import pytest
import transformers
from helpers.tokenizer_corpus import HAN, RNG, TEXTS, VERSES, args
from hypothesis import given, settings
from hypothesis import strategies as st

import train_tokenizer
from bins.screen import screen
from bins.token_bin import BinWriter
from chat.template import load_template
from cli.args import parse
from corpora import BadRecord, Document
from files import alone_in
from tokenizer import MARKERS, load_tokenizer
from train_tokenizer import SAMPLES, Args, Sample, lines_of, main


def test_trains_saves_and_reports(corpus, tmp_path, capsys):
    report = main(args(tmp_path))
    out = tmp_path / "tokenizer"
    assert {path.name for path in out.iterdir()} == set(train_tokenizer.OUTPUTS)
    assert json.loads((out / "report.json").read_text()) == report
    tokenizer = load_tokenizer(out)
    assert report["vocab_size"] == tokenizer.vocab_size == 460 and report["sha256"] == tokenizer.sha256()
    assert report["documents"] == len(TEXTS) and report["held_out_documents"] == report["bad_records"] == 0
    rates = report["characters_per_token"][str(out)]
    assert rates == {k: round(len(t) / len(tokenizer.encode(t)), 3) for k, t in SAMPLES.items()}
    assert "characters per token" in capsys.readouterr().out
    assert [tokenizer.special_id(piece) for piece in ("<unk>", "<s>", "</s>", "<pad>", *MARKERS)] == [*range(8)]
    assert tokenizer.chat_template == load_template(tokenizer, "ours").jinja


def test_a_text_comes_back_as_it_was(corpus, tmp_path):
    main(args(tmp_path))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for text in (
        "，；！（）：？“”《》",
        "a\nb\n\n c",
        "  two  spaces ",
        "Ａ１ﬁ㈱",
        "\t\r\n\x00",
        "䲜龘𠀀",
        "\u2585 ⁇ <s> <|user|>",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for text, n in (("\n", 1), ("2024", 4), ("龘", 3)):
        assert len(tokenizer.encode(text)) == n
    assert len(tokenizer.encode(VERSES[0])) <= len(VERSES[0])


def test_a_corpus_without_spaces_still_has_a_space(corpus, tmp_path):
    corpus(VERSES)
    main(args(tmp_path, vocab_size=400))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    (space,) = tokenizer.encode(" ")
    assert tokenizer.id_to_bytes(space) == b" "


def test_pieces_stay_within_a_line_and_digits_alone(corpus, tmp_path):
    corpus(["2024年春三月初三\n2024年春三月初三"] * 50)
    main(args(tmp_path, vocab_size=275))
    pieces = [load_tokenizer(tmp_path / "tokenizer").id_to_bytes(i).decode(errors="replace") for i in range(264, 275)]
    assert "年" in pieces and any(len(piece) > 1 for piece in pieces)
    assert not any(len(piece) > 1 and (set(piece) & set("0123456789\n")) for piece in pieces)


def test_a_vocabulary_of_characters_is_full_of_them_and_may_be_smaller(corpus, tmp_path):
    corpus([*VERSES * 5, "".join(HAN) * 2])
    for size in (504, 5000):
        report = main(args(tmp_path, max_piece_length=1, vocab_size=size))
        tokenizer = load_tokenizer(tmp_path / "tokenizer")
        pieces = [tokenizer.id_to_bytes(i).decode() for i in range(264, tokenizer.vocab_size)]
        assert all(len(piece) == 1 for piece in pieces) and report["vocab_size"] == tokenizer.vocab_size
        assert size - 2 <= tokenizer.vocab_size <= size if size == 504 else tokenizer.vocab_size < 1500


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_pieces_are_no_longer_than_asked_for(corpus, tmp_path, longest):
    main(args(tmp_path, max_piece_length=longest, vocab_size=371 if longest == 1 else 460, character_coverage=1.0))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert max(len(tokenizer.id_to_bytes(i).decode()) for i in range(264, tokenizer.vocab_size)) == longest


def test_held_out_documents_are_never_trained_on(corpus, tmp_path):
    held_out = Document("密" * 50, "test", held_out=True)
    undecided = [Document(f"{HAN[100 + n]}" * 9 + f" {n}", "test") for n in range(200)]
    corpus([*TEXTS, held_out, *undecided])
    report = main(args(tmp_path, vocab_size=700, held_out=0.2, character_coverage=1.0))
    (batch,) = screen(undecided, min_chars=1, held_out=0.2, deduplicate=False)  # as data_process.py decides
    secret = [document.text for document in batch.documents if document.held_out]
    assert 20 < len(secret) == report["held_out_documents"] - 1 < 60
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    pieces = b"".join(tokenizer.id_to_bytes(i) for i in range(264, tokenizer.vocab_size)).decode()
    assert not any(text[0] in pieces for text in [held_out.text, *secret])
    assert all(d.text[0] in pieces for d in batch.documents if not d.held_out)
    text = "\n".join([held_out.text, *secret])
    assert report["characters_per_token"][str(tmp_path / "tokenizer")]["held-out"] == pytest.approx(
        len(text) / len(tokenizer.encode(text)), abs=1e-3
    )


def test_bad_records_are_counted_and_left_out(corpus, tmp_path):
    corpus([*TEXTS, BadRecord("a.jsonl:3", "not JSON", "{"), Document("half a pair: \ud83d", "test", False)])
    assert main(args(tmp_path))["bad_records"] == 2


def test_characters_that_sentencepiece_keeps_for_itself(corpus, tmp_path):
    """Lines with U+2585 are left out by the trainer, NUL and tabs are not; texts with any of them still encode."""
    corpus([*TEXTS, *["\u2585 block", "nul \x00 here", "tab\there"] * 5])
    main(args(tmp_path))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for text in ("\u2585 block", "nul \x00 here", "tab\there"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_corpus_gives_the_same_files(corpus, tmp_path):
    for name, threads in (("a", 1), ("b", 3)):
        main(args(tmp_path, out=tmp_path / name, threads=threads))
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_transformers_reads_the_same_ids(corpus, tmp_path):
    main(args(tmp_path))
    ours, theirs = (
        load_tokenizer(tmp_path / "tokenizer"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    for text in [*TEXTS, *SAMPLES.values(), "", " \n ", "龘\x00😀"]:
        assert theirs(text).input_ids == ours.encode(text)


# --- sampling


@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1, max_size=20))
)
@settings(max_examples=100, deadline=None)
def test_a_sample_is_within_its_budget_in_order_and_whole_if_it_fits(lines):
    size = sum(len(line.encode()) for line in lines)
    whole, part = Sample(size, 0), Sample(size // 3, 0)
    for line in lines:
        whole.add(line)
        part.add(line)
    assert whole.lines == lines and whole.bytes == size
    assert part.bytes == sum(len(line.encode()) for line in part.lines) <= size // 3
    rest = iter(lines)
    assert all(line in rest for line in part.lines)  # a subsequence


def test_a_sample_is_even_over_the_stream():
    sample, n = Sample(60_000, 7), 100_000
    for i in range(n):
        sample.add(f"{i:06}")
    kept = [int(line) for line in sample.lines]
    assert 7_000 < len(kept) <= 10_000  # at most a quarter below the budget, but for chance
    # The mean place of k even draws has a standard deviation of n / sqrt(12 k); six of them are never seen.
    assert abs(sum(kept) / len(kept) - n / 2) < 6 * n / (12 * len(kept)) ** 0.5
    again = Sample(60_000, 8)
    for i in range(n):
        again.add(f"{i:06}")
    assert again.lines != sample.lines


def test_long_lines_are_cut_not_dropped(corpus, tmp_path):
    text = "".join(RNG.choices(HAN[:50], k=50_000))
    pieces = list(lines_of(text + "\n\nend"))
    assert "".join(pieces) == text + "end" and max(map(len, pieces)) == train_tokenizer.MAX_LINE
    corpus([text])
    assert main(args(tmp_path, vocab_size=350))["bytes"] == len(text.encode())


# --- vocabulary and coverage


def test_coverage_leaves_room_for_pieces_of_more_than_a_character(corpus, tmp_path):
    rare = "".join(HAN) * 2
    corpus([*VERSES * 5, rare])
    report = main(args(tmp_path, vocab_size=504))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    lengths = [len(tokenizer.id_to_bytes(i).decode()) for i in range(264, 504)]
    # 7/8 of 240 ids, give or take the space and a rounding of the share
    assert abs(lengths.count(1) - 210) <= 2 and report["character_coverage"] < 0.9995
    assert main(args(tmp_path, vocab_size=900))["character_coverage"] == 0.9995


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"vocab_size": 100_000}, r"--vocab_size 100000 is too large for this corpus: set it to at most \d+$"),
        (
            {"vocab_size": 300, "character_coverage": 1.0},
            r"too small: .* need at least \d+ ids; raise --vocab_size, or lower --character_coverage$",
        ),
        ({"vocab_size": 10}, r"--vocab_size 10 is too small: .* need at least \d+ ids; raise --vocab_size$"),
        ({"character_coverage": 0.5}, r"--character_coverage should be between 0\.98 and 1, found 0\.5"),
        ({"max_piece_length": 513}, "--max_piece_length should be at most 512, found 513"),
        ({"threads": 1025}, "--threads should be at most 1024, found 1025"),
        ({"max_piece_length": 0}, r"--max_piece_length should be at least 1, found 0"),
        ({"sample_bytes": -1}, r"--sample_bytes should be at least 1, found -1"),
        ({"held_out": 1.0}, r"--held_out should be a share of at least 0 and below 1, found 1"),
        ({"compare": (Path("nowhere"),)}, r"nowhere: no such tokenizer"),
        (
            {"merge": Path("nowhere.model")},
            r"--merge nowhere\.model: no such file; expected a SentencePiece",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(corpus, tmp_path, changes, error):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        main(args(tmp_path, **changes))
    assert not [*tmp_path.iterdir()]


def test_the_largest_vocabulary_named_in_the_error_works(corpus, tmp_path):
    with pytest.raises(ValueError, match="at most") as caught:
        main(args(tmp_path, vocab_size=100_000))
    largest = int(str(caught.value).split()[-1])
    assert main(args(tmp_path, vocab_size=largest))["vocab_size"] == largest


@pytest.mark.parametrize("records", [[], ["", " \n "], [BadRecord("x", "y", "z")]])
def test_an_empty_corpus_is_refused_and_the_old_tokenizer_stays(corpus, tmp_path, records):
    main(args(tmp_path))
    before = (tmp_path / "tokenizer" / "tokenizer.model").read_bytes()
    corpus(records)
    with pytest.raises(ValueError, match="no text to train on: 0 documents"):
        main(args(tmp_path))
    assert (tmp_path / "tokenizer" / "tokenizer.model").read_bytes() == before


def test_a_corpus_of_bad_records_is_refused_with_the_first_of_them(corpus, tmp_path):
    corpus([BadRecord("a.jsonl:3", "not JSON", "{"), BadRecord("a.jsonl:9", "no text", "{}")])
    with pytest.raises(ValueError, match=r"2 bad records, the first one a\.jsonl:3: not JSON$"):
        main(args(tmp_path))


def test_a_folder_of_other_things_is_not_replaced(corpus, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds files of something else \(model\.safetensors\)"):
        main(args(tmp_path))
    assert (tmp_path / "tokenizer" / "model.safetensors").exists()


# --- the command line


def test_flags_and_presets(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("train_tokenizer: {vocab_size: 5000, character_coverage: 0.99, corpus: [poems]}")
    got = parse(Args, "train_tokenizer", ["--config", str(preset), "--max_piece_length", "2", "--compare", "a", "b"])
    assert (got.vocab_size, got.character_coverage, got.max_piece_length) == (5000, 0.99, 2)
    assert got.compare == (Path("a"), Path("b")) and got.corpus == ("poems",)
    assert parse(Args, "train_tokenizer", []) == Args()


def test_a_place_that_cannot_be_written_is_refused_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="should be a directory, found a file"):
        train_tokenizer.check_arguments(train_tokenizer.Args(out=tmp_path / "file"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no permission to write to"):
        train_tokenizer.check_arguments(train_tokenizer.Args(out=tmp_path / "new"))


def test_bad_records_and_the_built_in_texts_are_told(corpus, tmp_path, capsys):
    corpus([*TEXTS, BadRecord("a.txt:3", "not UTF-8", "x"), BadRecord("a.txt:9", "other", "y")])
    main(args(tmp_path))
    printed = capsys.readouterr().out
    assert "bad records, left out: 2; the first one a.txt:3: not UTF-8\n" in printed
    assert "(Chinese, English, digits, code: short texts built into this program;" in printed


def test_a_tokenizer_that_bins_were_made_with_is_not_replaced(corpus, tmp_path):
    main(args(tmp_path))
    old = load_tokenizer(tmp_path / "tokenizer")
    with BinWriter(tmp_path / "train_00000", old.vocab_size, old.eos_id, old.sha256()) as writer:
        writer.add([10, old.eos_id])
    main(args(tmp_path))  # the same tokenizer
    with pytest.raises(ValueError, match=r"train_00000\.bin was made with, .*: --overwrite true"):
        main(args(tmp_path, vocab_size=450))
    assert load_tokenizer(tmp_path / "tokenizer").sha256() == old.sha256()
    main(args(tmp_path, vocab_size=450, overwrite=True))
    assert load_tokenizer(tmp_path / "tokenizer").vocab_size == 450


def test_two_at_a_time_in_one_directory_are_refused(corpus, tmp_path):
    with alone_in(tmp_path / "tokenizer"), pytest.raises(ValueError, match="another process is at work"):
        main(args(tmp_path))
    assert (tmp_path / "tokenizer").is_dir()

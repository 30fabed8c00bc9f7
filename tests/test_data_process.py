"""data_process.py from texts to bins: what is written, in which order, and what it refuses."""

import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers.data_process_runs import NOT_COMPARED, Runs, contents, decoded, write_texts
from helpers.tiny_texts import made_up_texts, train_tiny_tokenizer

import data_process
from bins import screen
from bins.token_bin import TokenBin
from cli import progress
from cli.args import parse, run
from corpora import CORPORA, Conversation, Corpus, Document, SourceArgs, read
from corpora.registry import stable_share
from data_process import Args, main
from tokenizer import load_tokenizer

REPOSITORY = Path(data_process.__file__).parent


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(screen, "BATCH_ITEMS", 5)


@pytest.fixture
def make(tmp_path, tokenizer_path) -> Runs:
    return Runs(tmp_path, tokenizer_path)


def register(monkeypatch, name: str, items: list, conversations: list | None = None) -> SourceArgs:
    stream = None if conversations is None else lambda raw_dir: iter(conversations)
    monkeypatch.setitem(CORPORA, name, Corpus(name, "", "", lambda raw_dir: iter(items), stream))
    return SourceArgs(corpus=(name,))


# --- what is written --------------------------------------------------------------------------------------------------


def test_every_document_lies_in_one_bin_in_order(make, tokenizer_path):
    texts = made_up_texts(60)
    out, summary = make(texts)
    tokenizer = load_tokenizer(tokenizer_path)
    train, heldout = decoded(out / "train_00000.bin", tokenizer), decoded(out / "heldout.bin", tokenizer)
    assert train == [text for text in texts if stable_share(text) >= 0.1]
    assert heldout == [text for text in texts if stable_share(text) < 0.1] and heldout
    assert {p.name for p in out.iterdir()} == {*summary["files"], "summary.json", "tokenizer", *NOT_COMPARED}
    stored = json.loads((out / "summary.json").read_text())
    assert stored.pop("sha256") and stored == summary
    TokenBin(out / "train_00000.bin").check(tokenizer.sha256(), tokenizer.vocab_size)


def test_the_summary_counts_what_an_independent_count_finds(make, tokenizer_path, tmp_path, capsys):
    texts = made_up_texts(40)
    lines = [json.dumps({"text": text}) for text in [*texts, "short", texts[3], texts[3], "", "short"]]
    (tmp_path / "some.jsonl").write_text("\n".join([*lines[:7], "{broken", *lines[7:], '{"other": 1}']))
    (tmp_path / "more.txt").write_text("one more text, all on a line of its own")
    source = SourceArgs(input=(tmp_path / "some.jsonl", tmp_path / "more.txt"))
    out, summary = make(None, source=source)
    tokenizer = load_tokenizer(tokenizer_path)
    n_tokens, n_chars = sum(len(tokenizer.encode(text)) + 2 for text in texts), sum(map(len, texts))
    assert summary["sources"]["some.jsonl"] == {
        "documents": 40,
        "held_out": sum(stable_share(text) < 0.1 for text in texts),
        "tokens": n_tokens,
        "held_out_tokens": sum(len(tokenizer.encode(text)) + 2 for text in texts if stable_share(text) < 0.1),
        "characters": n_chars,
        "bytes": sum(len(text.encode()) for text in texts),
        "too_short": 3,
        "duplicate": 2,
        "bad": 2,
        "characters_per_token": pytest.approx(n_chars / n_tokens, abs=1e-3),
    }
    assert summary["sources"]["more.txt"]["documents"] == 1
    assert summary["total"]["documents"] == 41 and summary["total"]["bad"] == 2
    bins = [TokenBin(out / name) for name in ("train_00000.bin", "heldout.bin")]
    assert sum(map(len, bins)) == summary["total"]["tokens"]
    assert sum(bin.meta["text_bytes"] for bin in bins) == summary["total"]["bytes"]
    assert sum(bin.meta["sources"].get("some.jsonl", 0) for bin in bins) == 40
    bad = [json.loads(line) for line in (out / "bad_records.jsonl").read_text().splitlines()]
    assert [record["where"].rpartition("/")[2] for record in bad] == ["some.jsonl:8", "some.jsonl:47"]
    assert bad[0]["raw"].strip() == "{broken" and "JSON" in bad[0]["reason"]
    table = capsys.readouterr().out
    assert "some.jsonl" in table and f"{n_tokens:,}" in table and "too short" in table
    where, reason = bad[0]["where"], bad[0]["reason"]
    assert f"bad records are in {out / 'bad_records.jsonl'}; the first one: {where}: {reason}\n" in table


def test_the_bytes_do_not_depend_on_the_number_of_processes(make):
    texts = made_up_texts(120)
    texts += [*texts[::7], "short"]
    settings = {"tokens_per_file": 1500, "save_all_text": True}
    one, summary = make(texts, "one", **settings)
    many, again = make(texts, "many", processes=3, **settings)
    assert contents(one) == contents(many) and summary == again and len(list(one.glob("train_*.bin"))) > 2


def test_without_a_terminal_plain_lines_tell_how_far_it_is(make, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0)
    make([*made_up_texts(20), *["long enough, seen before"] * 20])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenizing")]
    pattern = r"tokenizing: \d[\d.]+k?B of \d[\d.]+kB, \d[\d.]+[kM]?B/s, 00:\d\d left"
    assert len(lines) >= 4 and re.fullmatch(pattern, lines[0])


def test_bins_are_cut_between_documents_at_tokens_per_file(make, tokenizer_path):
    texts = [*made_up_texts(50), "一" * 900 + "longer than a whole file", *made_up_texts(50, seed=1)]
    whole, _ = make(texts, "whole", deduplicate=False)
    cut, _ = make(texts, "cut", deduplicate=False, tokens_per_file=700)
    bins = [TokenBin(path) for path in sorted(cut.glob("train_*.bin"))]
    assert np.array_equal(np.concatenate([bin.tokens for bin in bins]), TokenBin(whole / "train_00000.bin").tokens)
    assert sorted(len(bin) > 700 for bin in bins) == [False] * (len(bins) - 1) + [True]
    for bin, following in itertools.pairwise(bins):  # each is as full as it can be
        assert len(bin) + int(following.offsets[1]) > 700
    tokenizer = load_tokenizer(tokenizer_path)
    found = [text for bin in bins for text in decoded(bin.path, tokenizer)]
    assert found == decoded(whole / "train_00000.bin", tokenizer)
    three = int(TokenBin(whole / "train_00000.bin").offsets[3])
    for size, documents_in_first in ((three, 3), (three - 1, 2)):
        out, _ = make(None, f"out{size}", deduplicate=False, tokens_per_file=size)
        assert TokenBin(out / "train_00000.bin").meta["documents"] == documents_in_first


def test_a_corpus_with_its_own_split_keeps_it(make, monkeypatch, tokenizer_path):
    texts = made_up_texts(40)
    items = [Document(text, "split", held_out=i % 4 == 0) for i, text in enumerate(texts)]
    out, _ = make(None, source=register(monkeypatch, "split", items), held_out=0.5)
    assert decoded(out / "heldout.bin", load_tokenizer(tokenizer_path)) == texts[::4]


def test_nothing_held_out_when_nothing_is_asked_for(make):
    out, summary = make(made_up_texts(30), held_out=0.0)
    assert summary["total"]["held_out"] == 0 and not list(out.glob("heldout*"))


def test_the_split_of_a_document_stays_when_others_come_and_go(make, tokenizer_path):
    texts = made_up_texts(200)
    tokenizer = load_tokenizer(tokenizer_path)
    first, _ = make(texts, "first")
    second, _ = make(random.Random(1).sample(texts[100:], 100) + made_up_texts(100, seed=7), "second")
    heldout = [set(decoded(out / "heldout.bin", tokenizer)) for out in (first, second)]
    train = [set(decoded(out / "train_00000.bin", tokenizer)) for out in (first, second)]
    assert heldout[0] and heldout[1] and not (heldout[0] | heldout[1]) & (train[0] | train[1])


def test_all_text_is_the_training_text_alone(make):
    texts = made_up_texts(60)
    out, _ = make(texts, save_all_text=True)
    kept = [text for text in texts if stable_share(text) >= 0.1]
    assert (out / "all_text.txt").read_text() == "".join(text + "\n\n" for text in kept)


def test_conversations_become_two_files(make, monkeypatch):
    talk = [
        Conversation(
            [{"role": "user", "content": f"写诗 {i}"}, {"role": "assistant", "content": "床前"}], i == 2, "poem"
        )
        for i in range(4)
    ]
    items = [Document(text, "poems") for text in made_up_texts(20)]
    out, summary = make(None, source=register(monkeypatch, "talk", items, talk))
    train, heldout = (
        [json.loads(line) for line in (out / f"sft_{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    )
    assert train == [{"messages": talk[i].messages, "task": "poem"} for i in (0, 1, 3)]
    assert heldout == [{"messages": talk[2].messages, "task": "poem"}]
    assert summary["conversations"] == {"train": 3, "held_out": 1}
    only_talk, _ = make(None, "only", source=register(monkeypatch, "only", [], talk))
    assert not list(only_talk.glob("*.bin")) and (only_talk / "sft_train.jsonl").is_file()


def test_a_vocabulary_beyond_uint16_is_written_as_uint32(make, tmp_path):
    """A model of 72,000 characters, each one an id."""
    letters = [chr(i) for i in (*range(0x4E00, 0xA000), *range(0x20000, 0x2A000), *range(0xAC00, 0xD000))]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "</s>", *letters])}
    wide = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    wide.decoder = tokenizers.decoders.ByteFallback()
    wide.add_special_tokens(["<unk>", "</s>"])
    (tmp_path / "wide").mkdir()
    wide.save(str(tmp_path / "wide" / "tokenizer.json"))
    (tmp_path / "wide" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    ids = [2, 65535, 65536, 65537, len(vocab) - 1, *range(70000, 70005)]
    write_texts(tmp_path / "texts.jsonl", ["".join(letters[i - 2] for i in ids)])
    source = {"input": (tmp_path / "texts.jsonl",), "processes": 1, "held_out": 0.0}
    main(Args(tokenizer=tmp_path / "wide", out=tmp_path / "out", **source))
    bin = TokenBin(tmp_path / "out" / "train_00000.bin")
    assert bin.tokens.dtype == np.uint32 and bin.tokens.tolist() == [*ids, 1]


def test_the_tokenizer_lies_beside_the_bins(make, tokenizer_path, tmp_path):
    out, _ = make(made_up_texts(20))
    expected = load_tokenizer(tokenizer_path)
    assert load_tokenizer(out / "tokenizer").sha256() == expected.sha256()
    (out / "tokenizer" / "mark").touch()
    make(made_up_texts(20))
    assert (out / "tokenizer" / "mark").exists()  # it is there: not written again
    other = train_tiny_tokenizer(tmp_path, vocab_size=690)
    with pytest.raises(ValueError, match=r"tokenizer is another tokenizer than --tokenizer .*; choose another --out"):
        main(Args(input=(tmp_path / "texts.jsonl",), tokenizer=other, out=out, processes=1))
    main(Args(input=(tmp_path / "texts.jsonl",), tokenizer=other, out=out, processes=1, overwrite=True))
    assert load_tokenizer(out / "tokenizer").sha256() == load_tokenizer(other).sha256() != expected.sha256()


def test_a_novel_is_cut_into_parts_and_nothing_held_out_is_a_warning(make, tokenizer_path, tmp_path, capsys):
    lines = [f"第{n}回" + re.sub(r"\s", "", text) for n, text in enumerate(made_up_texts(400))]
    (tmp_path / "novel.txt").write_text("\n".join(lines[:9]) + "\n\n" + "\n".join(lines[9:]))
    source = SourceArgs(input=(tmp_path / "novel.txt",), part_chars=400)
    out, summary = make(None, source=source)
    numbers = summary["sources"]["novel.txt"]
    assert numbers["documents"] > 20 and numbers["held_out"] > 0
    assert numbers["held_out_tokens"] == len(TokenBin(out / "heldout.bin"))
    texts = [decoded(out / name, load_tokenizer(tokenizer_path)) for name in ("train_00000.bin", "heldout.bin")]
    assert max(len(text) for each in texts for text in each) <= 400
    assert sorted("".join(texts[0] + texts[1]).replace("\n", "")) == sorted("".join(lines))
    assert "held-out tokens" in capsys.readouterr().out
    whole = SourceArgs(input=(tmp_path / "novel.txt",), part_chars=0)
    _, summary = make(None, "whole", source=whole, held_out=0.001)
    assert summary["sources"]["novel.txt"]["documents"] == 2
    said = capsys.readouterr().out
    assert (
        "nothing is held out of novel.txt (2 documents)" in said and ": give more texts, or lower --part_chars" in said
    )


def test_the_share_that_is_proposed_holds_some_documents_out():
    summary = {"made_from": {"held_out": 0.01}, "sources": {"a": {"documents": 20, "held_out": 0}}}
    (said,) = data_process.warnings_of(summary)
    share = float(re.search(r"raise --held_out \((\S+) almost always", said)[1])
    assert (1 - share) ** 20 < 0.02 < (1 - share + 0.01) ** 20


@pytest.mark.parametrize(("form", "n"), [("lines", 4), ("paragraphs", 2), ("file", 1), ("auto", 2)])
def test_what_a_document_of_a_txt_file_is(tmp_path, form, n):
    text = "one line of it\nanother line\n\na third line\nthe fourth one"
    (tmp_path / "a.txt").write_text(text)
    documents = [item.text for item in read(SourceArgs(input=(tmp_path / "a.txt",), format=form))]
    assert len(documents) == n and (form != "file" or documents == [text])
    with pytest.raises(ValueError, match="--format should be auto, lines, paragraphs or file, found 'line'"):
        read(SourceArgs(input=(tmp_path / "a.txt",), format="line"))


def test_damaged_files_are_named_and_counted(make, tmp_path, capsys):
    texts = made_up_texts(4000)
    folder = tmp_path / "in"
    folder.mkdir()
    packed = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    (folder / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "b.parquet").write_bytes(b"PAR1 no parquet")
    write_texts(folder / "c.jsonl", made_up_texts(30, seed=5))
    _, summary = make(None, source=SourceArgs(input=(folder,)))
    assert [Path(line.split(":")[0]).name for line in summary["damaged_files"]] == ["a.jsonl.gz", "b.parquet"]
    assert summary["total"]["documents"] > 1000 and summary["total"]["bad"] >= 2
    printed = capsys.readouterr().out
    assert "damaged files" in printed and "a.jsonl.gz" in printed and "b.parquet" in printed


# --- refusals ---------------------------------------------------------------------------------------------------------


def bad_inputs(folder: Path) -> dict[str, tuple[list, str]]:
    """Name -> flags that cannot work, and what the one sentence has to say."""
    files = {
        "empty.txt": "",
        "short.txt": "one\ntwo\n",
        "broken.jsonl": '{"text": \n[1]\n{"other": "a key that nobody asked for"}\n',
        "fine.txt": "a text that is long enough\n",
        "failing.py": "def data_loader():\n    yield 'a text long enough'\n    raise RuntimeError('on purpose')\n",
        "without.py": "x = 1\n",
        "folder/picture.png": "",
        "tokenizer.model": "no model",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    fine = ["--input", folder / "fine.txt"]
    return {
        "missing": (["--input", folder / "nowhere"], "nowhere: no file or folder"),
        "empty": (["--input", folder / "empty.txt"], "no text to train on .no documents at all"),
        "short": (["--input", folder / "short.txt"], "no text to train on .2 too short"),
        "broken": (
            ["--input", folder / "broken.jsonl"],
            "no text to train on .3 bad, the first at .*jsonl:1: not",
        ),
        "no text": (["--input", folder / "folder"], "no file to read"),
        "no loader": (["--loader", folder / "nowhere.py"], "--loader .*nowhere.py: no such file"),
        "failing loader": (
            ["--loader", folder / "failing.py"],
            "failed after 1 records: RuntimeError: on purpose",
        ),
        "no generator": (["--loader", folder / "without.py"], "data_loader"),
        "corpus": (["--corpus", "peoms"], "unknown corpus 'peoms'; did you mean 'poems'"),
        "absent corpus": (["--corpus", "wudao", "--raw_dir", folder], "wudao/ is missing: download the corpus"),
        "no tokenizer": ([*fine, "--tokenizer", folder / "nowhere"], "nowhere: no such tokenizer"),
        "bad tokenizer": ([*fine, "--tokenizer", folder / "tokenizer.model"], "tokenizer.model"),
        "share": ([*fine, "--held_out", 1.0], "--held_out should be a share"),
        "min_chars": ([*fine, "--min_chars", -1], "--min_chars should be at least 0, found -1"),
        "processes": ([*fine, "--processes", 0], "--processes should be from 1 to 4,096, found 0"),
        "out in input": (["--input", folder, "--out", folder / "out"], "lies inside --input"),
        "all held out": ([*fine, "--held_out", 0.999999], "no text to train on .1 held out"),
    }


def test_bad_input_is_one_sentence_and_changes_nothing(tmp_path, make, tokenizer_path, monkeypatch, capsys):
    out, _ = make(made_up_texts(30))
    before = contents(out)
    for name, (flags, sentence) in bad_inputs(tmp_path).items():
        words = ["--tokenizer", tokenizer_path, "--out", out, "--overwrite", True, "--processes", 1, *flags]
        monkeypatch.setattr(sys, "argv", ["data_process.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            run(main, parse(Args, "data_process"))
        assert re.fullmatch(f"error: .*{sentence}.*", str(stop.value.code)), (name, stop.value.code)
        assert contents(out) == before and not (out / "data_process.part").exists(), name
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["missing", "broken"])
def test_bad_input_as_a_process(tmp_path, tokenizer_path, name):
    flags, sentence = bad_inputs(tmp_path)[name]
    command = [sys.executable, "data_process.py", "--tokenizer", tokenizer_path, "--out", tmp_path / "out", *flags]
    done = subprocess.run([*map(str, command)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "" and not list(tmp_path.glob("out/*"))
    assert re.fullmatch(f"error: .*{sentence}.*\n", done.stderr), done.stderr


def test_a_file_name_that_is_not_utf8_and_no_standard_input(tmp_path, tokenizer_path):
    (tmp_path / "b\udcff.txt").write_text("a text that is long enough\n")
    command = [sys.executable, "data_process.py", "--tokenizer", tokenizer_path, "--out", tmp_path / "out"]
    command += ["--input", tmp_path / "b\udcff.txt", "--processes", "1"]
    shell = ["bash", "-c", 'exec "$@" <&-', "bash", *command]
    done = subprocess.run(
        shell, cwd=REPOSITORY, capture_output=True, timeout=60, env=os.environ | {"PYTHONIOENCODING": "utf-8"}
    )
    assert done.returncode == 0 and rb"b\udcff.txt" in done.stdout and done.stderr.count(b"error") == 0


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, make, tokenizer_path, monkeypatch):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.eos_id = None
    monkeypatch.setattr(data_process, "load_tokenizer", lambda path: tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        make(made_up_texts(3))

"""data_process.py from texts to bins: what is written, in which order, through kills, and what it refuses."""

import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tokenizers
from tiny_text import made_up_texts, train_tiny_tokenizer

import config
import data_process
import documents
import progress
from bins import TokenBin
from corpora import CORPORA, Conversation, Corpus, Document, SourceArgs
from corpora.registry import stable_share
from data_process import Args, main
from tokenizer import load_tokenizer

REPOSITORY = Path(data_process.__file__).parent
NOT_COMPARED = {"config.yaml", "run.json"}  # they say how the run was made: paths, processes, versions


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(documents, "BATCH_ITEMS", 5)


@pytest.fixture
def make(tmp_path, tokenizer_path):
    """Runs data_process in this process, on texts or on `source`; returns the folder and the summary."""

    def run(texts: list[str] | None, name: str = "out", **changes) -> tuple[Path, dict]:
        if texts is not None:
            write_texts(tmp_path / "texts.jsonl", texts)
        source = changes.pop("source", SourceArgs(input=(tmp_path / "texts.jsonl",)))
        settings = {**vars(source), "processes": 1, "held_out": 0.1, **changes}
        return tmp_path / name, main(Args(tokenizer=tokenizer_path, out=tmp_path / name, **settings))

    return run


def write_texts(path: Path, texts: list[str]) -> None:
    """JSON lines; a file that already says the same keeps its date, which data_process looks at."""
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if not path.is_file() or path.read_bytes() != data:
        path.write_bytes(data)


def decoded(path: Path, tokenizer) -> list[str]:
    """The documents of a bin as texts, split where its index says, eos at each end."""
    bin = TokenBin(path)
    spans = [bin.tokens[a:b].tolist() for a, b in zip(bin.offsets[:-1], bin.offsets[1:])]
    assert all(ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1] for ids in spans)
    return [tokenizer.decode(ids[:-1]) for ids in spans]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in NOT_COMPARED}


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
    assert {p.name for p in out.iterdir()} == {*summary["files"], "summary.json", *NOT_COMPARED}
    assert json.loads((out / "summary.json").read_text()) == summary
    TokenBin(out / "train_00000.bin").check(tokenizer.sha256(), tokenizer.vocab_size)


def test_the_summary_counts_what_an_independent_count_finds(make, tokenizer_path, tmp_path, capsys):
    texts = made_up_texts(40)
    lines = [json.dumps({"text": text}) for text in [*texts, "short", texts[3], texts[3], "", "short"]]
    (tmp_path / "some.jsonl").write_text("\n".join([*lines[:7], "{broken", *lines[7:], '{"other": 1}']))
    (tmp_path / "more.txt").write_text("one more text, all on a line of its own")
    source = SourceArgs(input=(tmp_path / "some.jsonl", tmp_path / "more.txt"))
    out, summary = make(None, source=source)
    tokenizer = load_tokenizer(tokenizer_path)
    n_tokens, n_chars = sum(len(tokenizer.encode(text)) + 1 for text in texts), sum(map(len, texts))
    assert summary["sources"]["some.jsonl"] == {
        "documents": 40,
        "held_out": sum(stable_share(text) < 0.1 for text in texts),
        "tokens": n_tokens,
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
    pattern = r"tokenizing: \d[\d.]+k? of \d[\d.]+kB, \d[\d.]+[kM]?B/s, 00:\d\d left"
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
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    made.decoder = tokenizers.decoders.ByteFallback()
    made.add_special_tokens(["<unk>", "</s>"])
    (tmp_path / "wide").mkdir()
    made.save(str(tmp_path / "wide" / "tokenizer.json"))
    (tmp_path / "wide" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    ids = [2, 65535, 65536, 65537, len(vocab) - 1, *range(70000, 70005)]
    write_texts(tmp_path / "texts.jsonl", ["".join(letters[i - 2] for i in ids)])
    source = {"input": (tmp_path / "texts.jsonl",), "processes": 1, "held_out": 0.0}
    main(Args(tokenizer=tmp_path / "wide", out=tmp_path / "out", **source))
    bin = TokenBin(tmp_path / "out" / "train_00000.bin")
    assert bin.tokens.dtype == np.uint32 and bin.tokens.tolist() == [*ids, 1]


# --- going on and starting over ---------------------------------------------------------------------------------------


def test_a_second_run_has_nothing_to_do(make, monkeypatch, capsys):
    texts = made_up_texts(40)
    out, summary = make(texts)
    before, dates = contents(out), {p: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.setattr(data_process, "process", None)
    assert make(texts, processes=2)[1] == summary
    assert "nothing to do" in capsys.readouterr().out
    assert contents(out) == before and {p: p.stat().st_mtime_ns for p in out.iterdir()} == dates


def test_a_file_that_is_gone_is_made_again(make):
    texts = made_up_texts(40)
    out, _ = make(texts)
    before = contents(out)
    (out / "heldout.bin").unlink()
    (out / "train_00000.idx").write_bytes(b"")
    make(texts)
    assert contents(out) == before


def test_other_arguments_are_refused_until_told_to_overwrite(make):
    texts = made_up_texts(60)
    out, _ = make(texts, tokens_per_file=500, save_all_text=True)
    before = contents(out)
    with pytest.raises(
        ValueError, match=r"made with other min_chars, save_all_text, tokens_per_file;.*--overwrite true"
    ):
        make(texts, min_chars=12)
    with pytest.raises(ValueError, match=r"made with other inputs;"):
        make([*texts, "and one text more"], tokens_per_file=500, save_all_text=True)
    assert contents(out) == before
    make(texts, min_chars=12, overwrite=True)
    fresh, _ = make(texts, "fresh", min_chars=12)
    assert contents(out) == contents(fresh)


def test_bins_of_other_origin_are_not_replaced_unasked(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_00000.bin").write_bytes(b"\1\0\2\0")
    (tmp_path / "out" / "train_poems.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="other programs"):
        make(made_up_texts(30))
    out, _ = make(made_up_texts(30), overwrite=True)
    assert (out / "train_poems.bin").read_bytes() == b"mine" and len(TokenBin(out / "train_00000.bin")) > 2


def test_an_unfinished_run_is_gone_on_with_or_dropped_only_when_told(make, monkeypatch, capsys):
    texts = made_up_texts(60)
    fresh, _ = make(texts, "fresh", tokens_per_file=500)
    with monkeypatch.context() as patch:
        patch.setattr(data_process, "write_conversations", lambda *_: 1 / 0)  # stands for a kill just before the end
        with pytest.raises(ZeroDivisionError):
            make(texts, tokens_per_file=500)
    with pytest.raises(ValueError, match=r"unfinished run with other tokens_per_file;.*--overwrite true"):
        make(texts, tokens_per_file=600)
    out, _ = make(texts, tokens_per_file=500)
    assert "going on" in capsys.readouterr().out and contents(out) == contents(fresh)
    assert not (out / "data_process.part").exists()


# --- real processes ---------------------------------------------------------------------------------------------------

# The script as it is run, with batches so small that a small corpus has many.
SCRIPT = """
import sys, documents
documents.BATCH_ITEMS = 4
import config, data_process
config.run(data_process.main, data_process.Args, "data_process")
"""
SLOW_LOADER = """
import json, os, time
def data_loader():
    for line in open({path!r}):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        yield json.loads(line)
"""


def start(*words: object, pause: float = 0, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "PAUSE": str(pause), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_what_is_read_again_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0)
    batches = [documents.Batch(end) for end in (5, 10, 15, 20)]
    assert [batch.end for batch in data_process.behind(batches, 10)] == [15, 20]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "reading again what is done: 5 of 10 records",
        "reading again what is done: 10 of 10 records",
    ]
    assert [batch.end for batch in data_process.behind(batches, 0)] == [5, 10, 15, 20]
    assert capsys.readouterr().err == ""


def test_killed_again_and_again_the_bytes_are_those_of_an_uninterrupted_run(make, tmp_path, tokenizer_path):
    """SIGKILL where a third and where two thirds of the bins are there; finished bins are not written again."""
    texts = made_up_texts(160)
    write_texts(tmp_path / "texts.jsonl", [None, "short", *texts[:120], texts[0], None, *texts[120:], texts[150], None])
    loader = tmp_path / "slow.py"
    loader.write_text(SLOW_LOADER.format(path=str(tmp_path / "texts.jsonl")))
    settings = {"tokens_per_file": 1000, "save_all_text": True}
    whole, _ = make(None, "whole", source=SourceArgs(loader=loader), **settings)
    n_bins = len(list(whole.glob("train_*.bin")))
    assert n_bins > 6
    out = tmp_path / "out"
    words = ["--loader", loader, "--tokenizer", tokenizer_path, "--out", out, "--held_out", 0.1]
    words += ["--tokens_per_file", 1000, "--save_all_text", True]
    kept = {}
    for part, processes in ((n_bins // 3, 2), (2 * n_bins // 3, 1)):
        process = start(*words, "--processes", processes, pause=0.01)
        awaited = out / "data_process.part" / f"train_{part:05d}.json"
        deadline = time.monotonic() + 60
        while not awaited.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        said, _ = process.communicate(timeout=20)
        assert ("going on" in said) == bool(kept) and not list(out.glob("*.bin"))
        assert not psutil.wait_procs(workers, timeout=20)[1]  # the workers end with the one who started them
        finished = {p: p.stat().st_mtime_ns for p in (out / "data_process.part").glob("train_*.bin")}
        assert kept.items() <= finished.items()
        kept = {p: date for p, date in finished.items() if p.name < f"train_{part:05d}.bin"}
    assert "going on" in finish(start(*words, "--processes", 1))
    assert contents(out) == contents(whole)
    assert all((out / path.name).stat().st_mtime_ns == date for path, date in kept.items())


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(make, tmp_path, tokenizer_path):
    settings = {"tokens_per_file": 2000, "save_all_text": True}
    whole, _ = make(made_up_texts(200), "whole", **settings)
    words = ["--input", tmp_path / "texts.jsonl", "--tokenizer", tokenizer_path, "--out", tmp_path / "out"]
    words += ["--held_out", 0.1, "--tokens_per_file", 2000, "--save_all_text", True, "--processes", 1]
    # No file may grow beyond 20 kB: what a disk without room is to a program.
    full = start(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2))
    _, err = full.communicate()
    assert full.returncode == 1 and re.fullmatch(r"error: no room for .*\n", err), err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data_process.part"]
    assert "going on" in finish(start(*words))
    assert contents(tmp_path / "out") == contents(whole)


def test_ctrl_c_ends_at_once_and_quietly(tmp_path, tokenizer_path):
    write_texts(tmp_path / "texts.jsonl", made_up_texts(400))
    (tmp_path / "slow.py").write_text(SLOW_LOADER.format(path=str(tmp_path / "texts.jsonl")))
    words = ["--loader", tmp_path / "slow.py", "--tokenizer", tokenizer_path, "--out", tmp_path / "out"]
    process = start(*words, "--processes", 2, "--tokens_per_file", 500, pause=0.02, start_new_session=True)
    while not (tmp_path / "out" / "data_process.part" / "train_00000.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == ""


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
        "missing": (["--input", folder / "nowhere"], "no file or folder .*nowhere"),
        "empty": (["--input", folder / "empty.txt"], "nothing to train on .no documents at all"),
        "short": (["--input", folder / "short.txt"], "nothing to train on .2 too short"),
        "broken": (
            ["--input", folder / "broken.jsonl"],
            "nothing to train on .3 bad, the first at .*jsonl:1: not",
        ),
        "no text": (["--input", folder / "folder"], "no file to read"),
        "no loader": (["--loader", folder / "nowhere.py"], "no loader .*nowhere.py"),
        "failing loader": (
            ["--loader", folder / "failing.py"],
            "failed after 1 records: RuntimeError: on purpose",
        ),
        "no generator": (["--loader", folder / "without.py"], "data_loader"),
        "corpus": (["--corpus", "peoms"], "unknown corpus 'peoms'; did you mean 'poems'"),
        "absent corpus": (["--corpus", "wudao", "--raw_dir", folder], "put its files into"),
        "no tokenizer": ([*fine, "--tokenizer", folder / "nowhere"], "no tokenizer at .*nowhere"),
        "bad tokenizer": ([*fine, "--tokenizer", folder / "tokenizer.model"], "tokenizer.model"),
        "share": ([*fine, "--held_out", 1.0], "held_out is a share"),
        "processes": ([*fine, "--processes", 0], "processes .0. and tokens_per_file"),
        "out in input": (["--input", folder, "--out", folder / "out"], "lies in the input"),
        "all held out": ([*fine, "--held_out", 0.999999], "nothing to train on .1 held out"),
    }


def test_bad_input_is_one_sentence_and_changes_nothing(tmp_path, make, tokenizer_path, monkeypatch, capsys):
    out, _ = make(made_up_texts(30))
    before = contents(out)
    for name, (flags, sentence) in bad_inputs(tmp_path).items():
        words = ["--tokenizer", tokenizer_path, "--out", out, "--overwrite", True, "--processes", 1, *flags]
        monkeypatch.setattr(sys, "argv", ["data_process.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            config.run(main, Args, "data_process")
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


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, make, tokenizer_path, monkeypatch):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.eos_id = None
    monkeypatch.setattr(data_process, "load_tokenizer", lambda path: tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        make(made_up_texts(3))

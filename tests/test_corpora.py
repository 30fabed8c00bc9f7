"""corpora/__init__.py: what is read when."""

import json
from pathlib import Path

import pytest

from cli.args import as_flags, parse
from cli.record import to_plain
from corpora import CORPORA, SourceArgs, read, read_conversations, text_size
from corpora.registry import register, stable_share


@pytest.fixture
def raw_dir(tmp_path):
    poem = {"title": "江上", "author": "李白", "form": "五言绝句", "lines": ["一二三四五"] * 4}
    (tmp_path / "poems.jsonl").write_text(json.dumps(poem) + "\n", encoding="utf8")
    return tmp_path


def test_the_poems_are_read_when_nothing_is_asked_for(raw_dir):
    (document,) = read(SourceArgs(raw_dir=raw_dir))
    assert document.source == "poems"
    assert len(list(read_conversations(SourceArgs(raw_dir=raw_dir)))) == 1


def test_own_files_take_the_place_of_the_poems_and_stand_beside_a_named_corpus(raw_dir):
    (raw_dir / "a.txt").write_text("甲\n", encoding="utf8")
    (raw_dir / "b.py").write_text("def data_loader():\n    yield {'body': '乙'}\n", encoding="utf8")
    inputs = {"input": (raw_dir / "a.txt",), "loader": raw_dir / "b.py", "raw_dir": raw_dir, "text_key": "body"}
    assert [document.text for document in read(SourceArgs(**inputs))] == ["甲", "乙"]
    assert list(read_conversations(SourceArgs(**inputs))) == []
    both = [document.source for document in read(SourceArgs(corpus=("poems",), **inputs))]
    assert both == ["poems", "a.txt", "b.py"]


def test_an_unknown_corpus_is_refused_at_once_with_the_nearest_name():
    for function in (read, read_conversations):
        with pytest.raises(ValueError, match="unknown corpus 'poem'; did you mean 'poems'"):
            function(SourceArgs(corpus=("poem",)))


def test_missing_files_are_refused_at_once(raw_dir):
    for args in ({"input": (Path("nowhere"),)}, {"loader": Path("nowhere.py")}, {"corpus": ("wudao",)}):
        with pytest.raises(FileNotFoundError):
            read(SourceArgs(raw_dir=raw_dir, **args))


def test_adding_a_corpus_is_adding_a_function(monkeypatch):
    monkeypatch.setitem(CORPORA, "mine", None)

    @register("mine", description="two texts", licence="none")
    def mine(raw_dir):
        yield from ("a", "b")

    assert list(read(SourceArgs(corpus=("mine",)))) == ["a", "b"]
    assert CORPORA["mine"].conversations is None


def test_how_much_there_is_to_read_is_known_before_it_is_read(raw_dir):
    (raw_dir / "a.txt").write_text("甲乙\n", encoding="utf8")
    (raw_dir / "b.jsonl.gz").write_bytes(bytes(10))
    (raw_dir / "wudao").mkdir()
    (raw_dir / "wudao" / "a.json").write_bytes(bytes(100))
    (raw_dir / "l.py").touch()
    inputs = (raw_dir / "a.txt", raw_dir / "b.jsonl.gz")
    assert text_size(SourceArgs(input=inputs)) == 7 + 30  # what is packed grows about threefold
    named = text_size(SourceArgs(corpus=("poems", "wudao"), raw_dir=raw_dir))
    assert named == CORPORA["poems"].text_bytes + 100
    assert text_size(SourceArgs(input=inputs, loader=raw_dir / "l.py")) is None
    assert text_size(SourceArgs(corpus=("mnbvc",), raw_dir=raw_dir)) is None


def test_every_corpus_has_a_licence_and_a_description():
    assert {"poems", "laws", "sanguo", "wiki_en", "definitions", "dialogues", "wikipedia_cn", "mnbvc"} <= set(CORPORA)
    assert all(corpus.name == name and corpus.licence and corpus.description for name, corpus in CORPORA.items())


def test_source_args_survive_a_config_file():
    args = SourceArgs(corpus=("laws", "poems"), input=(Path("a"),), loader=Path("b.py"))
    for original in (args, SourceArgs()):
        words = as_flags(SourceArgs, to_plain(original), where="test")
        assert parse(SourceArgs, "data_process", words) == original


def test_stable_share_is_uniform_and_the_same_everywhere():
    assert stable_share("title:江上") == 0.12000672354140743, "sha256sum of the key says so"
    shares = [stable_share(str(i)) for i in range(10_000)]
    # Three standard deviations of a binomial share at 10,000 draws: 0.015 at 1/2, 0.004 at 2 %.
    assert abs(sum(share < 0.5 for share in shares) / 10_000 - 0.5) < 0.015
    assert abs(sum(share < 0.02 for share in shares) / 10_000 - 0.02) < 0.0042

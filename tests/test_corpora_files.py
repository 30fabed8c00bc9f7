"""corpora/files.py: the same documents from every format, and a place for every record that cannot be read."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.text_files import ONE_LINE, TEXTS, split, write
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import files
from corpora.files import find_files, read_files, read_loader, records
from corpora.registry import RAW_CHARS


@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "txt"])
def test_every_format_gives_the_same_texts(tmp_path, kind, packed):
    texts = {"json": TEXTS, "jsonl": TEXTS, "csv": TEXTS}.get(kind, ONE_LINE)
    texts = [text for text in texts if "\t" not in text] if kind == "tsv" else texts
    path = write(tmp_path / f"data.{kind}{packed}", texts)
    assert split(read_files(path, "text")) == (texts, [])
    assert next(iter(read_files(path, "text"))).source == path.name


def test_parquet(tmp_path):
    path = write(tmp_path / "data.parquet", TEXTS)
    assert split(read_files(path, "text")) == (TEXTS, [])
    documents, (bad,) = split(read_files(path, "content"))
    assert documents == [] and "no column 'content'" in bad.reason and "'id', 'text'" in bad.reason


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), max_size=6))
def test_jsonl_and_csv_hold_any_text(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("any")
    assert split(read_files(write(folder / "a.jsonl", texts), "text")) == (texts, [])
    assert split(read_files(write(folder / "a.json", texts), "text")) == (texts, [])
    # The csv module of older Pythons refuses NUL.
    texts = [text.replace("\0", "") for text in texts]
    assert split(read_files(write(folder / "a.csv", texts), "text")) == (texts, [])


def test_an_array_of_strings_needs_no_key(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('["甲", "乙"]', encoding="utf8")
    assert split(read_files(path, "text"))[0] == ["甲", "乙"]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff甲\r\n乙\r\n".encode())
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "c"}\r\n\r\n{"text": "d"}\r\n')
    assert split(read_files(tmp_path, "text")) == (["甲", "乙", "c", "d"], [])


# --- txt ----------------------------------------------------------------------------------------------------------


def test_txt_without_blank_lines_is_one_document_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n甲\n乙\n\n\n", encoding="utf8")
    assert split(read_files(path, "text"))[0] == ["甲", "乙"]


def test_txt_with_blank_lines_is_one_document_a_block(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("甲\n 乙\n \u3000\n\n丙\n", encoding="utf8")
    assert split(read_files(path, "text"))[0] == ["甲\n 乙", "丙"]


def test_txt_is_cut_where_a_document_has_no_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_CHARS", 10)
    path = tmp_path / "a.txt"
    path.write_text("甲\n\n" + "abcdefg\n" * 3 + "x" * 25, encoding="utf8")
    texts = split(read_files(path, "text"))[0]
    assert texts[0] == "甲"
    assert "".join(texts[1:]).replace("\n", "") == "abcdefg" * 3 + "x" * 25
    assert max(map(len, texts)) <= 10


# --- bad records --------------------------------------------------------------------------------------------------


def test_bad_lines_of_jsonl(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "no end',
        b'{"content": "other key"}',
        b'{"text": 3}',
        b"[1, 2]",
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "good too"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    texts, bad = split(read_files(path, "text"))
    assert texts == ["good", "good too"]
    assert [record.where for record in bad] == [f"{path}:{n}" for n in (2, 3, 4, 5, 6, 7, 8)]
    no_key = "no key 'text' (set by --text_key); the keys are 'content'"
    reasons = ["not JSON", no_key, "found int", "found list", "not UTF-8", "not UTF-8"]
    assert all(reason in record.reason for reason, record in zip(reasons, bad))
    for record in bad:
        record.raw.encode("utf8")
        assert len(record.raw) <= RAW_CHARS * len("\\udcff")


def test_a_line_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_CHARS", 50)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * n}) for n in (1, 300, 2)) + "\n")
    texts, (bad,) = split(read_files(path, "text"))
    assert texts == ["x", "xx"]
    assert bad.where == f"{path}:2" and "longer than 50" in bad.reason


def test_bad_rows_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,"two\nlines"\n2\n3,"x"y\n4,\xff\n\n5,good\n6,"open\n')
    texts, bad = split(read_files(path, "text"))
    assert texts == ["two\nlines", "good"]
    assert [record.where for record in bad] == [f"{path}:{n}" for n in (4, 5, 6, 9)]
    assert "1 fields under a header of 2" in bad[0].reason
    assert "not UTF-8" in bad[2].reason


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_utf16_is_read_by_its_byte_order_mark(tmp_path, packed):
    path = tmp_path / f"a.jsonl{packed}"
    raw = '{"text": "床前明月光"}\n{"text": "疑是地上霜"}\n'.encode("utf-16")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert split(read_files(path, "text")) == (["床前明月光", "疑是地上霜"], [])


def test_utf16_cut_inside_a_character_is_a_broken_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("床前明月光\n疑是".encode("utf-16")[:-1])
    _, (bad,) = split(read_files(path, "text"))
    assert "the file is broken" in bad.reason


def test_bytes_of_another_encoding_say_how_to_convert_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\xff"}\n{"text": "a\\ud800"}\n')
    _, bad = split(read_files(path, "text"))
    assert bad[0].reason == "not UTF-8 at character 2; if it is of another encoding, convert the file with iconv"
    assert bad[1].reason == "not UTF-8 at character 2"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "big5", "latin-1"])
def test_gbk_is_named_with_the_command_that_converts_it(tmp_path, name, encoding):
    path, chinese = tmp_path / name, encoding != "latin-1"
    text = (
        "窗前明月光，山上的花都開了。"
        if encoding == "big5"
        else "床前明月光，疑是地上霜。"
        if chinese
        else "Müller à Zürich"
    )
    rows = {"a.jsonl": f'{{"text": "{text}"}}\n', "a.csv": f"text\n{text}\n", "a.txt": f"{text}\n"}
    path.write_bytes(rows[name].encode(encoding))
    _, (bad,) = split(read_files(path, "text"))
    named = "it looks like GBK or GB18030: convert the file with iconv -f gb18030 -t utf-8 FILE > NEW_FILE"
    assert "not UTF-8" in bad.reason and (named in bad.reason) == encoding.startswith("gb")


def test_gbk_that_breaks_json_is_named_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "他說乗法，许多人来了"}\n'.encode("gb18030"))  # 乗 ends with the byte of a backslash
    _, (bad,) = split(read_files(path, "text"))
    assert bad.reason.startswith("not JSON: ") and "it looks like GBK or GB18030" in bad.reason


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("indent", [0, 1, 4])
def test_objects_over_many_lines(tmp_path, name, indent):
    path, objects = tmp_path / name, [{"text": text, "more": [{"a": 1}, {"b": 2}]} for text in (*TEXTS, "}\n{")]
    raw = ("\n".join(json.dumps(each, indent=indent, ensure_ascii=False) for each in objects) + "\n").encode()
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert [record.value for record in records(path)] == objects
    if indent:  # a broken object costs itself
        first = raw.replace(b'"text"', b"text", 1)
        path.write_bytes(gzip.compress(first) if name.endswith("gz") else first)
        bad, *rest = records(path)
        assert bad.reason.startswith("not JSON") and [record.value for record in rest] == objects[1:]
    cut = raw[: raw.rindex(b"}")]
    path.write_bytes(gzip.compress(cut) if name.endswith("gz") else cut)
    *rest, bad = records(path)
    assert bad.reason.startswith("not JSON") and [record.value for record in rest] == objects[:-1]


def test_another_encoding_is_bad_records_only(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("id,text\n1,床前明月光\n2,疑是地上霜\n".encode("gb18030"))
    texts, bad = split(read_files(path, "text"))
    assert texts == [] and len(bad) == 2


def test_malformed_elements_of_an_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "a"},\n{"text": b},\n{"text": "c"}\n]', encoding="utf8")
    texts, (bad,) = split(read_files(path, "text"))
    assert texts == ["a", "c"] and bad.where == f"{path}:3"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.json.zst", "a.csv.gz", "a.parquet"])
def test_a_truncated_file_is_a_bad_record(tmp_path, name):
    path = write(tmp_path / name, [f"document {i} {i**9}" for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-200])
    _, bad = split(read_files(path, "text"))
    assert bad and all(record.where.startswith(str(path)) for record in bad)


def test_zst_of_several_frames_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(text) for text in (b"one\n", b"two\n")))
    assert split(read_files(path, "text"))[0] == ["one", "two"]


# --- which files --------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_depth_in_a_fixed_order(tmp_path):
    for name in ("b/2.txt", "a.jsonl.gz", "b/1.json", ".hidden/3.txt", "b/.4.txt", "README.md", "c.tar.gz"):
        write(tmp_path / name, [name])
    (tmp_path / "wiki_00").write_text('{"text": "no suffix"}\n')
    (tmp_path / "LICENSE").write_text("free")
    names = [str(path.relative_to(tmp_path)) for path in find_files(tmp_path)]
    assert names == ["a.jsonl.gz", "b/1.json", "b/2.txt", "wiki_00"]
    assert split(read_files(tmp_path, "text"))[0] == ["a.jsonl.gz", "b/1.json", "b/2.txt", "no suffix"]
    assert {document.source for document in read_files(tmp_path, "text")} == {tmp_path.name}


def test_paths_that_cannot_be_read_are_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no file or folder"):
        read_files(tmp_path / "nowhere", "text")
    with pytest.raises(ValueError, match="has no file to read; expected txt"):
        read_files(tmp_path, "text")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match="shows no known format"):
        read_files(tmp_path / "a.docx", "text")
    with pytest.raises(ValueError, match="shows no known format"):
        next(records(tmp_path / "a.docx"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet.gz")
    with pytest.raises(ValueError, match="shows no known format"):
        read_files(tmp_path / "a.parquet.gz", "text")


def test_reading_is_lazy(tmp_path):
    path = write(tmp_path / "a.jsonl", [str(i) for i in range(1000)])
    stream = read_files(path, "text")
    assert next(stream).text == "0"
    path.write_text("")
    # What was not read is gone: only a buffer of it can still come.
    assert sum(1 for _ in stream) < 1000


def test_real_texts(shared):
    for path in (shared / "pretrain").glob("*.txt"):
        texts, bad = split(read_files(path, "text"))
        assert len(texts) > 1 and not bad


# --- the user's own loader ----------------------------------------------------------------------------------------


def test_loader(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("LAST = 'c'\ndef data_loader():\n    yield from ['a', {'body': 'b'}, 3]\n    yield LAST\n")
    texts, (bad,) = split(read_loader(path, "body"))
    assert texts == ["a", "b", "c"]
    assert bad.where == f"{path}:3" and "found int" in bad.reason
    assert next(read_loader(path, "body")).source == "mine.py"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", r"after 0 records: AttributeError: .*data_loader"),
        ("def data_loader():\n    yield 'a'\n    raise KeyError('k')", "after 1 records: KeyError: 'k'"),
        ("def data_loader(:", "after 0 records: SyntaxError"),
        ("def data_loader():\n    return None", "after 0 records: TypeError"),
        ("import no_such_module", "after 0 records: ModuleNotFoundError"),
    ],
)
def test_a_loader_that_fails_is_one_sentence(tmp_path, code, message):
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(ValueError, match=message):
        list(read_loader(path, "text"))


def test_no_loader(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_loader"):
        read_loader(tmp_path / "none.py", "text")

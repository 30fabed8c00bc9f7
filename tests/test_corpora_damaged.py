"""Damaged files: what can be read of them counts, and they are named."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.text_files import split, write

from corpora import files, tables
from corpora.files import read_files, records
from corpora.registry import BadRecord, DamagedFile


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_half_of_a_packed_file_gives_its_readable_part_and_is_named(tmp_path, kind, packed):
    texts = [f"document {i} {i**9}" for i in range(20_000)]
    path = write(tmp_path / f"a.{kind}{packed}", texts)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found, bad = split(read_files(path, "text"))
    assert 2000 < len(found) < 20_000 and found[:-1] == texts[: len(found) - 1]  # the last line may be cut
    assert isinstance(bad[-1], DamagedFile) and "it is cut off" in bad[-1].reason
    assert sum(isinstance(record, DamagedFile) for record in bad) == 1


def test_what_comes_before_changed_bytes_is_kept(tmp_path):
    texts = [f"document {i} {i**9}" for i in range(20_000)]
    for path in (write(tmp_path / "a.jsonl.gz", texts), write(tmp_path / "b.jsonl.zst", texts)):
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
        path.write_bytes(data)
        found, bad = split(read_files(path, "text"))
        assert 2000 < len(found) < 20_000 and found[:-9] == texts[: len(found) - 9]
        assert isinstance(bad[-1], DamagedFile)


def test_several_members_and_zeros_behind_them_are_whole(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n") + bytes(5000))
    assert split(read_files(tmp_path / "a.txt.gz", "text")) == (["one", "two"], [])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"no such format" * 99])
def test_a_damaged_file_of_a_folder_costs_itself(tmp_path, name, content):
    write(tmp_path / "z.jsonl", ["good"])
    (tmp_path / name).write_bytes(content)
    texts, (bad,) = split(read_files(tmp_path, "text"))
    assert texts == ["good"] and isinstance(bad, DamagedFile) and bad.where == str(tmp_path / name)


def test_corrupt_pages_of_parquet_cost_the_rest_of_the_file(tmp_path):
    rows = [{"text": f"document {i} {i**9}"} for i in range(4000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000, compression="zstd", use_dictionary=False)
    second = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[second : second + 3000] = bytes(3000)
    path.write_bytes(data)
    texts, (bad,) = split(read_files(path, "text"))
    assert texts == [row["text"] for row in rows[:2000]] and isinstance(bad, DamagedFile)


def test_dates_and_times_that_python_cannot_hold(tmp_path):
    columns = {
        "text": pa.array(["a", "b"]),
        "ns": pa.array([1, 2], pa.timestamp("ns")),
        "far": pa.array([2**31 - 1, 1], pa.date32()),
        "zone": pa.array([2**40, None], pa.timestamp("ns", "No/Where")),
        "inside": pa.array([[2**50], [5]], pa.list_(pa.timestamp("s"))),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    assert split(read_files(path, "text")) == (["a", "b"], [])  # other columns are not read
    odd, good = records(path)
    assert isinstance(odd, BadRecord) and "column 'inside'" in odd.reason
    assert good.value["ns"] == "1970-01-01 00:00:00.000000002" and good.value["far"] == "1970-01-02"
    assert good.value["zone"] is None


def test_a_cell_beyond_the_limit_is_one_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_CHARS", 100)
    write(tmp_path / "a.parquet", ["a", "月" * 101, "月" * 100])
    texts, (bad,) = split(read_files(tmp_path / "a.parquet", "text"))
    assert (
        texts == ["a", "月" * 100]
        and bad.where.endswith(":2")
        and "longer than 100 characters, found 101" in bad.reason
    )


def test_parquet_is_read_by_bytes(tmp_path, monkeypatch):
    sizes = []
    original = tables._rows
    monkeypatch.setattr(tables, "_rows", lambda batch: sizes.append(batch.num_rows) or original(batch))
    rows = [{"text": f"{i} " + "x" * 99_000, "other": "y" * 500_000} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", use_dictionary=False)
    assert len(split(read_files(tmp_path / "a.parquet", "text"))[0]) == 100
    assert max(sizes) == (1 << 22) * 100 // 9_900_000  # 4 MB of the column that is read, at 99 kB a row


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_row_beyond_the_limit_is_not_split_into_documents(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tables, "MAX_CHARS", 60)
    tab, long = "\t" if kind == "tsv" else ",", "x" * 150 if kind == "tsv" else '"' + "1,line\n" * 30 + '"'
    (tmp_path / f"a.{kind}").write_text(f"id{tab}text\n1{tab}good\n2{tab}{long}\n3{tab}too\n")
    texts, (bad,) = split(read_files(tmp_path / f"a.{kind}", "text"))
    assert texts == ["good", "too"] and bad.where.endswith(":3") and "longer than 60 characters" in bad.reason


def test_a_broken_byte_of_a_book_costs_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\nthr\xffee\nfour\n\nfive\n")
    texts, (bad,) = split(read_files(tmp_path / "a.txt", "text"))
    assert (
        texts == ["one", "two\nfour", "five"] and bad.where.endswith(":4") and "not UTF-8 at character 4" in bad.reason
    )


def test_a_folder_and_a_file_without_permission(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.txt", ["a"])
    write(tmp_path / "b.txt", ["b"])
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path / "in")  # root may read all
    with pytest.raises(PermissionError, match=r"/in: no permission to read this folder"):
        read_files(tmp_path, "text")

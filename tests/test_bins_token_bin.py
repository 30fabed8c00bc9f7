"""Token bins: what is written is what is read, and nothing wrong is read quietly."""

import contextlib
import json
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bins import token_bin
from bins.token_bin import BinWriter, TokenBin, open_at

SHA = "a" * 64
EOS = 2


def write(prefix: Path, documents: list, vocab_size: int = 100, **kwargs) -> TokenBin:
    with BinWriter(prefix, vocab_size, EOS, SHA, **kwargs) as writer:
        for ids in documents:
            writer.add(ids)
    return TokenBin(prefix.with_name(prefix.name + ".bin"))


@given(data=st.data(), vocab_size=st.sampled_from([3, 100, 65535, 65536, 65537, 2**20]))
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory, data, vocab_size):
    ids = st.lists(st.integers(0, vocab_size - 1), max_size=20).map(lambda ids: [*ids, EOS])
    documents = data.draw(st.lists(ids, max_size=12))
    bin = write(tmp_path_factory.mktemp("bins") / "train", documents, vocab_size)
    assert len(bin) == sum(map(len, documents)) and bin.meta["documents"] == len(documents)
    assert [bin.tokens[a:b].tolist() for a, b in zip(bin.offsets[:-1], bin.offsets[1:])] == documents
    assert bin.offsets.dtype == np.uint64 and bin.offsets[0] == 0
    bin.check(SHA, vocab_size)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_the_dtype_changes_exactly_where_ids_stop_fitting(tmp_path, vocab_size, dtype):
    bin = write(tmp_path / "train", [[vocab_size - 1, EOS]], vocab_size)
    assert bin.tokens.dtype == np.dtype(dtype) and bin.meta["dtype"] == np.dtype(dtype).name
    assert (tmp_path / "train.bin").read_bytes() == np.array([vocab_size - 1, EOS], dtype).tobytes()


def test_a_dtype_asked_for(tmp_path):
    assert write(tmp_path / "wide", [[5, EOS]], 100, dtype=np.uint32).tokens.dtype == np.uint32
    with pytest.raises(ValueError, match="65537 does not fit uint16"):
        BinWriter(tmp_path / "narrow", 65537, EOS, SHA, dtype=np.uint16)
    with pytest.raises(ValueError, match="uint16 or uint32, found int64"):
        BinWriter(tmp_path / "signed", 100, EOS, SHA, dtype=np.int64)
    with pytest.raises(ValueError, match="eos_id should be from 0 to 99"):
        BinWriter(tmp_path / "eos", 100, 100, SHA)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 100, EOS], "id 100 of document 1 .* vocabulary of 100"),
        ([-1, EOS], "id -1"),
        ([2**40, EOS], "id 1099511627776"),
        (np.array([70000, EOS], np.uint32), "id 70000"),
        ([5, 6], "ends with id 6, expected eos_id 2"),
        ([], "non-empty"),
        ([0.5, EOS], "float64"),
        ([[5, EOS]], r"shape \(1, 2\)"),
    ],
)
def test_a_document_that_is_wrong_leaves_no_byte(tmp_path, ids, message):
    with BinWriter(tmp_path / "train", 100, EOS, SHA) as writer:
        writer.add([7, EOS])
        with pytest.raises(ValueError, match=message):
            writer.add(ids)
        writer.add([8, EOS])
    assert TokenBin(tmp_path / "train.bin").tokens.tolist() == [7, EOS, 8, EOS]


def test_meta_counts_sources_and_bytes(tmp_path):
    with BinWriter(tmp_path / "train", 100, EOS, SHA) as writer:
        writer.add([5, EOS], source="诗", text_bytes=3)
        writer.add([5, 6, EOS], source="诗", text_bytes=6)
        writer.add([EOS], source="bad \udcff name", text_bytes=0)
    assert TokenBin(tmp_path / "train.bin").meta == {
        "dtype": "uint16",
        "tokens": 6,
        "documents": 3,
        "bos": [],
        "eos_id": EOS,
        "vocab_size": 100,
        "tokenizer_sha256": SHA,
        "sources": {"诗": 2, "bad \udcff name": 1},
        "runs": [["诗", 2], ["bad \udcff name", 1]],
        "text_bytes": 9,
        # what `sha256sum` prints of the ids 5 2 5 6 2 2 as uint16, and of the offsets 0 2 5 6 as uint64
        "sha256": sha256_of(tmp_path / "train.bin"),
        "idx_sha256": sha256_of(tmp_path / "train.idx"),
    }


def sha256_of(path: Path) -> str:
    """Return what the program sha256sum says of a file."""
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_the_hash_is_that_of_the_file_also_where_the_json_does_not_have_it(tmp_path):
    bin = write(tmp_path / "train", [[5, EOS], [6, EOS]])
    expected = sha256_of(bin.path)
    assert bin.sha256() == bin.meta["sha256"] == expected
    header = bin.path.with_suffix(".json")  # of a version that stored no hash
    header.write_text(
        json.dumps({key: value for key, value in bin.meta.items() if key not in ("sha256", "idx_sha256")})
    )
    assert "sha256" not in TokenBin(bin.path).meta and TokenBin(bin.path).sha256() == expected
    header.unlink(), bin.path.with_suffix(".idx").unlink()
    assert TokenBin(bin.path).sha256() == expected


def test_an_empty_bin(tmp_path):
    bin = write(tmp_path / "train", [])
    assert len(bin) == 0 and bin.tokens.tolist() == [] and bin.offsets.tolist() == [0]


def test_nothing_appears_before_it_is_whole_and_a_failure_leaves_the_old_one(tmp_path):
    write(tmp_path / "train", [[5, EOS]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="half way"), BinWriter(tmp_path / "train", 100, EOS, SHA) as writer:
        writer.add([9, 9, EOS])
        writer.state()
        assert TokenBin(tmp_path / "train.bin").tokens.tolist() == [5, EOS]
        raise RuntimeError("half way")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert write(tmp_path / "train", [[9, 9, EOS]]).tokens.tolist() == [9, 9, EOS]


def test_closing_can_be_killed_between_any_two_renames(tmp_path, monkeypatch):
    """After each prefix of the steps of `close`, a reader meets the old bin, the new one, or a refusal."""
    real = {"replace": Path.replace, "unlink": Path.unlink}
    outcomes = []
    for steps in range(5):
        folder = tmp_path / str(steps)
        write(folder / "train", [[5, EOS]], vocab_size=70000)
        writer = BinWriter(folder / "train", 100, EOS, SHA)
        writer.add([9, 9, EOS])
        left = [steps]

        def step(name, left=left):
            def run(*args, **kwargs):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real[name](*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, step(name))
            with contextlib.suppress(KeyboardInterrupt):
                writer.close()
        try:
            outcomes.append(TokenBin(folder / "train.bin").tokens.tolist())
        except ValueError:
            outcomes.append("refused")
    assert outcomes == [[5, EOS], "refused", "refused", "refused", [9, 9, EOS]]


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_going_on_from_a_state(tmp_path, kept, closed):
    """What was added after `state()` is cut off, whether it was written or even closed; then the bytes are the same."""
    documents = [[5, EOS], [6, 7, EOS], [EOS], [8, 9, 10, EOS], [11, EOS]]
    whole = write(tmp_path / "whole" / "train", documents)
    writer = BinWriter(tmp_path / "train", 100, EOS, SHA)
    for ids in documents[:kept]:
        writer.add(ids)
    state = json.loads(json.dumps(writer.state()))
    writer.add([50] * 5000 + [EOS])
    if closed:
        writer.close()
    else:
        writer._bin.flush()
    with BinWriter(tmp_path / "train", 100, EOS, SHA, state=state) as writer:
        for ids in documents[kept:]:
            writer.add(ids)
    assert {p.name for p in tmp_path.glob("train*")} == {"train.bin", "train.idx", "train.json"}
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"train.{suffix}").read_bytes() == whole.path.with_suffix(f".{suffix}").read_bytes()


def test_a_state_beyond_what_is_on_disk_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train\.bin\.part: expected at least 10 bytes .*, found 0; delete"):
        BinWriter(
            tmp_path / "train", 100, EOS, SHA, state={"tokens": 5, "documents": 2, "text_bytes": 0, "sources": {}}
        )


@pytest.mark.parametrize(
    ("suffix", "sizes"), [("bin", "expected 10 bytes.* found 8;"), ("idx", "expected 24 bytes.* found 22;")]
)
@pytest.mark.parametrize("change", [-2, 2])
def test_a_file_of_another_size_is_refused_with_both_sizes(tmp_path, suffix, sizes, change):
    write(tmp_path / "train", [[5, EOS], [5, 6, EOS]])
    path = tmp_path / f"train.{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    sizes = sizes if change < 0 else sizes.replace("found 8", "found 12").replace("found 22", "found 26")
    with pytest.raises(ValueError, match=sizes):
        TokenBin(tmp_path / "train.bin")


def test_other_broken_sets_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.bin: no such token bin; make it with data_process\.py"):
        TokenBin(tmp_path / "train.bin")
    write(tmp_path / "train", [[5, EOS], [5, 6, EOS]])
    index, header = tmp_path / "train.idx", tmp_path / "train.json"
    good = index.read_bytes(), header.read_text()
    index.write_bytes(np.array([0, 2, 6], "<u8").tobytes())
    with pytest.raises(ValueError, match=r"train\.idx: expected 5 tokens \(train\.json\), found 6"):
        TokenBin(tmp_path / "train.bin")
    index.unlink()
    with pytest.raises(ValueError, match=r"train\.idx: expected 24 bytes .* found 0"):
        TokenBin(tmp_path / "train.bin")
    index.write_bytes(good[0])
    for text in ("{", "[]", "{}", good[1].replace("uint16", "utter nonsense")):
        header.write_text(text)
        with pytest.raises(ValueError, match=r"train\.json does not describe"):
            TokenBin(tmp_path / "train.bin")
    header.unlink()
    with pytest.raises(ValueError, match=r"\.idx but no \.json"):
        TokenBin(tmp_path / "train.bin")


def test_another_tokenizer_is_refused(tmp_path):
    bin = write(tmp_path / "train", [[5, EOS]])
    bin.check(SHA, 100)
    for sha, vocab_size in (("b" * 64, 100), (SHA, 101)):
        with pytest.raises(ValueError, match=r"made with another tokenizer: expected .*, found 100, aaaaaaaaaaaa"):
            bin.check(sha, vocab_size)


def test_a_headerless_file_is_plain_uint16(tmp_path):
    """The format of nanoGPT's prepare.py: `np.array(ids, dtype=np.uint16).tofile(...)`."""
    ids = np.array([1, 65535, 0, EOS], np.uint16)
    ids.tofile(tmp_path / "val.bin")
    bin = TokenBin(str(tmp_path / "val.bin"))
    assert bin.tokens.tolist() == ids.tolist() and bin.offsets is None and bin.meta == {} and len(bin) == 4
    bin.check("any", 65536)
    with pytest.raises(ValueError, match="holds id 65535, but the tokenizer has 65535 ids"):
        bin.check("any", 65535)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="expected uint16 ids of 2 bytes, found 3 bytes"):
        TokenBin(tmp_path / "odd.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    empty = TokenBin(tmp_path / "empty.bin")
    empty.check("any", 1)
    assert len(empty) == 0


def test_readers_map_and_pickle_by_path(tmp_path):
    bin = write(tmp_path / "train", [[5] * 10000 + [EOS]])
    assert isinstance(bin.tokens, np.memmap) and not bin.tokens.flags.writeable
    pickled = pickle.dumps(bin)
    assert len(pickled) < 500
    again = pickle.loads(pickled)
    assert np.array_equal(again.tokens, bin.tokens) and again.meta == bin.meta


def test_a_file_is_gone_on_with_where_it_stood(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"kept, and what a killed run wrote later")
    with open_at(path, 4) as file:
        assert file.tell() == 4
        file.write(b"!")
        assert file.tell() == 5
    assert path.read_bytes() == b"kept!"


@pytest.mark.parametrize(
    ("file", "at", "value", "message"),
    [
        ("train.bin", 0, 200, "train.bin holds id 200, but the tokenizer has 100 ids: it is damaged"),
        ("train.bin", 0, 7, "train.bin: its SHA-256 is not the one"),
        ("train.idx", 8, 6, "train.idx: expected offsets that rise"),
        ("train.idx", 8, 2, "train.idx: its SHA-256 is not the one"),
        ("train.idx", 8, 0, "train.idx: expected offsets that rise"),
    ],
)
def test_damage_of_the_same_size_is_found_before_training(tmp_path, file, at, value, message):
    write(tmp_path / "train", [[5, 5, EOS], [6, EOS], [7, EOS]]).check(SHA, 100)
    data = bytearray((tmp_path / file).read_bytes())
    data[at] = value
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        TokenBin(tmp_path / "train.bin").check(SHA, 100)


def test_large_files_are_verified_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(token_bin, "VERIFIED_BYTES", 9)
    write(tmp_path / "train", [[5] * 5 + [EOS]])
    (tmp_path / "train.bin").write_bytes(np.array([5, 5, 6, 5, 5, EOS], "<u2").tobytes())
    TokenBin(tmp_path / "train.bin").check(SHA, 100)
    with pytest.raises(ValueError, match=r"train\.bin: its SHA-256"):
        TokenBin(tmp_path / "train.bin").check(SHA, 100, verify=True)

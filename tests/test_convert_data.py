"""convert.py data: token files of other programs. Oracles read and write the published layouts by hand (struct)."""

import itertools
import json
import pickle
import random
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest
from helpers.foreign_tokens import read_megatron, read_packed, write_lite, write_megatron, write_packed
from helpers.tiny_texts import train_tiny_tokenizer

import convert
from bins.token_bin import BinWriter, TokenBin
from chat.conversations import file_conversations
from convert import Data
from data_process import Args as ProcessArgs
from data_process import main as data_process
from tokenizer import Tokenizer, load_tokenizer

REPOSITORY = Path(__file__).parents[1]
EOS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder whose tokenizer/ has 700 ids."""
    folder = tmp_path_factory.mktemp("tokens")
    load_tokenizer(train_tiny_tokenizer(folder)).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer")


def some_documents(tokenizer: Tokenizer, n: int, seed: int) -> list[list[int]]:
    """Documents of 1 to 40 ids; each ends with eos, some are nothing else."""
    random_ = random.Random(seed)
    others = [i for i in range(tokenizer.vocab_size) if i != tokenizer.eos_id]
    return [[*random_.choices(others, k=max(0, random_.randint(-5, 39))), tokenizer.eos_id] for _ in range(n)]


def write_bin(prefix: Path, documents: list[list[int]], tokenizer: Tokenizer) -> None:
    with BinWriter(prefix, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
        for document in documents:
            writer.add(document)


def read_bin(path: Path) -> list[list[int]]:
    bin = TokenBin(path)
    return [bin.tokens[int(a) : int(b)].tolist() for a, b in itertools.pairwise(bin.offsets)]


def flat(documents: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(documents))


def run(source: Path, out: Path, form: str = "bins", **options) -> dict:
    return convert.data(Data(source=source, out=out, format=form, **options))


# ---- from ours, and back


@pytest.mark.parametrize("n", [1, 2, 97])
def test_megatron_has_the_documents_of_our_bins_and_comes_back(n, folder, tokenizer, tmp_path):
    documents = some_documents(tokenizer, n, seed=n)
    held_out = some_documents(tokenizer, 3, seed=1000 + n)
    (tmp_path / "ours").mkdir()
    write_bin(tmp_path / "ours/train_00000", documents[: n // 2 + 1], tokenizer)
    if documents[n // 2 + 1 :]:
        write_bin(tmp_path / "ours/train_00001", documents[n // 2 + 1 :], tokenizer)
    write_bin(tmp_path / "ours/heldout", held_out, tokenizer)
    run(tmp_path / "ours", tmp_path / "theirs", "megatron")
    assert read_megatron(tmp_path / "theirs/train") == [[document] for document in documents]
    assert read_megatron(tmp_path / "theirs/heldout") == [[document] for document in held_out]
    run(tmp_path / "theirs", tmp_path / "back", tokenizer=folder / "tokenizer")
    assert read_bin(tmp_path / "back/train_00000.bin") == documents
    assert read_bin(tmp_path / "back/heldout.bin") == held_out
    assert load_tokenizer(tmp_path / "back/tokenizer").sha256() == tokenizer.sha256()
    TokenBin(tmp_path / "back/train_00000.bin").check(tokenizer.sha256(), tokenizer.vocab_size)


@pytest.mark.parametrize("chunk", [5, 64, 4096])
def test_packed_chunks_have_the_ids_of_our_bins_and_come_back(chunk, folder, tokenizer, tmp_path):
    documents = [document for document in some_documents(tokenizer, 40, seed=chunk)]
    documents[-1] = [5, 6, tokenizer.eos_id]  # documents of eos alone at the end look like what fills a chunk
    write_bin(tmp_path / "mine", documents, tokenizer)
    run(tmp_path / "mine.bin", tmp_path / "theirs", "packed", chunk_tokens=chunk)
    paths = sorted((tmp_path / "theirs").glob("train_*.bin"))
    ids = [i for document in documents for i in document]
    assert read_packed(paths) == ids + [tokenizer.eos_id] * (-len(ids) % chunk)
    run(tmp_path / "theirs", tmp_path / "back", tokenizer=folder / "tokenizer", tokens_per_file=100)
    files = sorted((tmp_path / "back").glob("train_*.bin"))
    assert [document for path in files for document in read_bin(path)] == documents
    assert len(files) > 1 and all(len(TokenBin(path)) <= 100 for path in files)


def test_raw_has_the_ids_of_our_bins_under_the_names_of_nanogpt_and_comes_back(folder, tokenizer, tmp_path):
    documents, held_out = some_documents(tokenizer, 30, seed=1), some_documents(tokenizer, 4, seed=2)
    (tmp_path / "ours").mkdir()
    write_bin(tmp_path / "ours/train_00000", documents, tokenizer)
    write_bin(tmp_path / "ours/heldout", held_out, tokenizer)
    run(tmp_path / "ours", tmp_path / "theirs", "raw")
    assert array("H", (tmp_path / "theirs/train.bin").read_bytes()).tolist() == flat(documents)
    assert array("H", (tmp_path / "theirs/val.bin").read_bytes()).tolist() == flat(held_out)
    run(tmp_path / "theirs", tmp_path / "back", tokenizer=folder / "tokenizer")
    assert read_bin(tmp_path / "back/train_00000.bin") == documents
    assert read_bin(tmp_path / "back/heldout.bin") == held_out


def test_a_large_vocabulary_is_written_in_32_bits(tmp_path):
    documents = [[70_000, 1, 2], [65_536, 2]]
    with BinWriter(tmp_path / "large", 100_000, 2, "0" * 64) as writer:
        for document in documents:
            writer.add(document)
    run(tmp_path / "large", tmp_path / "m", "megatron")  # a prefix, as Megatron names its data
    assert read_megatron(tmp_path / "m/train") == [[document] for document in documents]
    assert Path(tmp_path / "m/train.idx").read_bytes()[17] == 4
    run(tmp_path / "large.bin", tmp_path / "p", "packed", chunk_tokens=5)
    assert read_packed([tmp_path / "p/train_0000000000.bin"]) == [70_000, 1, 2, 65_536, 2]
    with pytest.raises(
        ValueError, match="--format raw stores ids as uint16, up to 65536, and the vocabulary has 100000"
    ):
        run(tmp_path / "large.bin", tmp_path / "r", "raw")


# ---- from theirs


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_documents_of_megatron_of_any_dtype_end_with_eos_afterwards(code, folder, tokenizer, tmp_path, capsys):
    eos = tokenizer.eos_id
    theirs = [[[5, 6], [7, eos]], [], [[8, 9]], [[]], [[eos]], [[5], [], [6]]]
    write_megatron(tmp_path / "my_text_document", theirs, code)
    run(tmp_path / "my_text_document", tmp_path / "ours", tokenizer=folder / "tokenizer")
    path = tmp_path / "ours/train_00000.bin"
    assert read_bin(path) == [[5, 6, 7, eos], [8, 9, eos], [eos], [5, 6, eos]]
    assert TokenBin(path).meta["sources"] == {"my_text_document": 4}
    assert "4 documents, 11 tokens; 2 did not end with eos and got one; 2 without ids are left out" in (
        capsys.readouterr().out
    )


def test_sequences_of_megatron_may_lie_in_any_order(folder, tokenizer, tmp_path):
    eos = tokenizer.eos_id
    write_megatron(tmp_path / "a", [[[5, 6, eos]], [[7, eos]]], 4)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into("<2i2q", index, 34, 2, 3, 12, 0)  # the second sequence first
    (tmp_path / "a.idx").write_bytes(index)
    run(tmp_path / "a", tmp_path / "ours", tokenizer=folder / "tokenizer")
    assert read_bin(tmp_path / "ours/train_00000.bin") == [[7, eos], [5, 6, eos]]


def test_documents_that_begin_with_bos_as_those_of_tinyllama(folder, tokenizer, tmp_path, monkeypatch):
    bos, eos = 1, tokenizer.eos_id
    monkeypatch.setattr(Tokenizer, "bos_id", bos, raising=False)
    real = convert.load_tokenizer

    def with_bos(path):
        loaded = real(path)
        loaded.bos_id, loaded.begins = bos, [bos]
        return loaded

    monkeypatch.setattr(convert, "load_tokenizer", with_bos)
    write_packed(tmp_path / "slim_0", [bos, 5, 6, 7, bos, 8, bos, 9, 10], 4, bos, 8)
    write_packed(tmp_path / "slim_1", [bos, 11], 4, bos, 8)
    run(tmp_path, tmp_path / "ours", tokenizer=folder / "tokenizer", separator="bos")
    path = tmp_path / "ours/train_00000.bin"
    expected = [[bos, 5, 6, 7, eos], [bos, 8, eos], [bos, 9, 10, eos], [bos, 11, eos]]
    assert read_bin(path) == expected
    assert TokenBin(path).bos == [bos] and TokenBin(path).meta["sources"] == {"slim_0": 3, "slim_1": 1}


@pytest.mark.parametrize("n_tokens", [11, 12, 13, 4, 3])  # rows of 4: with and without a last row that is not full
@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_llm_lite_trainer(n_tokens, dtype, folder, tokenizer, tmp_path):
    eos = tokenizer.eos_id
    tokens = [(5 + i) if i % 5 != 3 else eos for i in range(n_tokens - 1)] + [eos]
    # its data_func_pretrain, with its mistake: full rows are written a second time (tokens[-0:] is all of them)
    rows = [np.array(tokens[i : i + 4], dtype=dtype) for i in range(0, n_tokens - 4, 4)]
    last, pad = tokens[-(n_tokens % 4) :], 4 - n_tokens % 4
    rows.append((np.array(last + [eos] * pad, dtype=dtype), np.array(last + [-100] * pad, dtype=dtype)))
    for k in (0, 10, 2):
        write_lite(tmp_path / f"mine_{k}.bin", rows)
    run(tmp_path, tmp_path / "ours", tokenizer=folder / "tokenizer")
    assert flat(read_bin(tmp_path / "ours/train_00000.bin")) == tokens * 3
    assert TokenBin(tmp_path / "ours/train_00000.bin").meta["sources"] == {"mine": 3 * tokens.count(eos)}


def test_ids_that_int16_made_negative_are_put_right(tmp_path):
    from bins import pickled_rows

    wrapped = np.array([40_000, 65_535, 7], dtype=np.uint16).view(np.int16)
    write_lite(tmp_path / "a_0.bin", [wrapped])
    assert [block.tolist() for block in pickled_rows.blocks(tmp_path / "a_0.bin")] == [[40_000, 65_535, 7]]


def test_questions_and_answers_of_llm_lite_trainer_become_conversations(folder, tokenizer, tmp_path):
    eos = tokenizer.eos_id
    pairs = [("what does the fox do", "it jumps"), ("二月", "春风"), ("who", "an old cat")]
    ids = [(tokenizer.encode(q), [*tokenizer.encode(a), eos]) for q, a in pairs]

    def row(*chosen):
        tokens = [i for q, a in chosen for i in q + a]
        labels = [i for q, a in chosen for i in [-100] * len(q) + a]
        pad = 200 - len(tokens)
        return np.array(tokens + [eos] * pad, np.int32), np.array(labels + [-100] * pad, np.int32)

    write_lite(tmp_path / "qa_0.bin", [row(ids[0], ids[1]), row(ids[2])])  # merged, and alone
    run(tmp_path, tmp_path / "ours", tokenizer=folder / "tokenizer")
    lines = [json.loads(line) for line in (tmp_path / "ours/sft_train.jsonl").read_text("utf8").splitlines()]
    assert [(line["prompt"], line["answer"]) for line in lines] == pairs
    broken: list = []
    found = list(file_conversations(tmp_path / "ours/sft_train.jsonl", broken))
    assert len(found) == 3 and not broken
    with pytest.raises(ValueError, match="has questions and answers, no documents: remove --format"):
        run(tmp_path, tmp_path / "m", "megatron", tokenizer=folder / "tokenizer")


def test_what_data_process_wrote_goes_through_every_format_and_comes_back_bit_for_bit(folder, tmp_path):
    texts = [f"The fox number {i} jumps over the fence. 春风 {i}\n" for i in range(50)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), "utf8")
    ours, place = tmp_path / "ours", folder / "tokenizer"
    data_process(ProcessArgs(input=(tmp_path / "texts.txt",), tokenizer=place, out=ours, held_out=0.2, processes=1))
    last = ours
    for form in ("megatron", "packed", "raw", "bins"):
        options = {"chunk_tokens": 50} if form == "packed" else {}
        run(last, tmp_path / form, form, **options)  # the tokenizer goes with the data
        last = tmp_path / form
    for name in ("train_00000", "heldout"):
        for suffix in (".bin", ".idx"):
            assert (last / name).with_suffix(suffix).read_bytes() == (ours / name).with_suffix(suffix).read_bytes()
        old, new = (json.loads((place / f"{name}.json").read_text()) for place in (ours, last))
        unnamed = {"sources": None, "runs": None}  # other formats do not keep the names of files
        assert old | unnamed == new | unnamed  # with the bytes of the text


# ---- what is refused


def damage_megatron(tmp_path: Path, tokenizer: Tokenizer, change) -> None:
    write_megatron(tmp_path / "a", [[[5, 6, tokenizer.eos_id]], [[7, tokenizer.eos_id]]], 4)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    data = change(index) or (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.__setitem__(0, 65), "begins with b'AMIDIDX"),
        (lambda index: index.__setitem__(9, 2), "found version 2 and code 4"),
        (lambda index: index.__setitem__(17, 7), "found version 1 and code 7"),
        (lambda index: index.__delitem__(slice(-3, None)), "expected 82 bytes for 2 sequences, found 79"),
        (lambda index: index.__delitem__(slice(20, None)), "is no index of Megatron"),
        (lambda index: index.extend(b"\0\0"), "has a mode for each sequence: it is of texts with images"),
        (lambda index: bytes(16), "expected 20 bytes .*, found 16"),
        (lambda index: struct.pack_into("<q", index, 42, 16), "is damaged: its offsets"),
        (lambda index: struct.pack_into("<q", index, 42, 2**62), "is damaged: its offsets"),
        (lambda index: struct.pack_into("<2i", index, 34, 6, -1), "is damaged: its offsets"),
        (lambda index: struct.pack_into("<q", index, 66, 3), "is damaged: its offsets"),
    ],
)
def test_a_damaged_dataset_of_megatron_is_one_sentence(change, message, folder, tokenizer, tmp_path):
    damage_megatron(tmp_path, tokenizer, change)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.bin", tmp_path / "out", tokenizer=folder / "tokenizer")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


class Evil:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "was run")


def test_a_pickle_that_wants_to_execute_is_refused_and_not_run(folder, tmp_path):
    for items in ([np.arange(3), Evil(tmp_path / "evil")], [Evil(tmp_path / "evil")]):
        write_lite(tmp_path / "a_0.bin", items)
        with pytest.raises(ValueError, match=r"is refused: it is a pickle that asks for .*, and nothing of it was run"):
            run(tmp_path / "a_0.bin", tmp_path / "out", tokenizer=folder / "tokenizer")
    (tmp_path / "a_0.idx").write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    with pytest.raises(ValueError, match=r"a_0.idx is refused"):
        run(tmp_path / "a_0.bin", tmp_path / "out", tokenizer=folder / "tokenizer")
    assert not (tmp_path / "evil").exists()
    pickle.loads((tmp_path / "a_0.idx").read_bytes())  # what any other reader would have done
    assert (tmp_path / "evil").read_text() == "was run"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol_are_read(protocol, tmp_path):
    from bins import pickled_rows

    values = np.array([1, 2, 300], np.int32)
    found, labels = pickled_rows.resolved(pickled_rows.loads(pickle.dumps(values, protocol), "here"))
    assert found.tolist() == [1, 2, 300] and found.dtype == np.int32 and labels is None
    with pytest.raises(ValueError, match="here is truncated or damaged"):
        pickled_rows.loads(pickle.dumps(values, protocol)[:-5], "here")


def test_chunks_that_are_truncated_or_none_are_one_sentence(folder, tokenizer, tmp_path):
    place = {"tokenizer": folder / "tokenizer"}
    path = tmp_path / "a_0000000000.bin"
    write_packed(tmp_path / "a", [5, tokenizer.eos_id], 4, tokenizer.eos_id, 8)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected 32 bytes for 4 ids, found 31; copy it again"):
        run(tmp_path, tmp_path / "out", **place)
    path.write_bytes(b"LITPKDS" + struct.pack("<QBQ", 1, 6, 0))
    with pytest.raises(ValueError, match="found version 1 and code 6"):
        run(tmp_path, tmp_path / "out", **place)
    path.write_bytes(b"LITPKDS\1")
    with pytest.raises(ValueError, match="is no packed chunk"):
        run(tmp_path, tmp_path / "out", **place)
    write_packed(tmp_path / "a", [5, 6], 2, 0, 8)
    with pytest.raises(ValueError, match=r"has no eos \(id \d+\): it was made with another tokenizer"):
        run(tmp_path, tmp_path / "out", **place)
    write_packed(tmp_path / "a", [5, 700, tokenizer.eos_id], 3, 0, 8)
    with pytest.raises(ValueError, match=r"document 0 of a has the id 700, and --tokenizer .* has 700 ids"):
        run(tmp_path, tmp_path / "out", **place)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_together_is_refused(folder, tokenizer, tmp_path):
    place = {"tokenizer": folder / "tokenizer"}
    write_bin(tmp_path / "mine", [[5, tokenizer.eos_id]], tokenizer)
    with pytest.raises(ValueError, match="is token bins of this repository already: choose another --format"):
        run(tmp_path / "mine.bin", tmp_path / "out")
    with pytest.raises(ValueError, match="--separator bos does nothing: token bins of this repository has an index"):
        run(tmp_path / "mine.bin", tmp_path / "out", "raw", separator="bos")
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        run(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="--chunk_tokens 5 needs --format packed"):
        Data(source=tmp_path, out=tmp_path / "out", chunk_tokens=5)
    write_megatron(tmp_path / "theirs", [[[5]]], 8)
    with pytest.raises(ValueError, match=r"has files of several formats: mine\.bin is token bins"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="which names no tokenizer: give --tokenizer"):
        run(tmp_path / "theirs.bin", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        run(tmp_path / "theirs.bin", tmp_path / "out", **place)
    (tmp_path / "empty").mkdir()
    write_megatron(tmp_path / "empty/none", [], 8)
    with pytest.raises(ValueError, match="has no documents"):
        run(tmp_path / "empty", tmp_path / "o2", **place)
    (tmp_path / "mine.bin").write_bytes(b"\xff\xff\0\0")  # other ids of the same size
    with pytest.raises(ValueError, match="id 65535"):
        run(tmp_path / "mine.bin", tmp_path / "o3", "raw")


def test_memory_does_not_grow_with_the_file(folder, tokenizer, tmp_path):
    """40 MB of ids become 40 MB of another format in a process that is allowed 30 MB beyond its start."""
    ids = np.random.default_rng(0).integers(5, 700, 20_000_000).astype("<u2")
    ids[1999::2000] = tokenizer.eos_id
    ids.tofile(tmp_path / "train.bin")
    (tmp_path / "out").mkdir()
    code = f"""
import resource
from pathlib import Path
from bins import exchange, foreign
from tokenizer import load_tokenizer
found, place = foreign.find(Path({str(tmp_path / "train.bin")!r})), Path({str(folder / "tokenizer")!r})
vocabulary = exchange.of_tokenizer(load_tokenizer(place), place)
now = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + (30 << 20), now + (30 << 20)))
for form in ("megatron", "bins"):
    exchange.exchange(found, Path({str(tmp_path / "out")!r}), vocabulary, exchange.Settings(form))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/train.bin").read_bytes() == ids.tobytes()
    assert (tmp_path / "out/train_00000.bin").read_bytes() == ids.tobytes()

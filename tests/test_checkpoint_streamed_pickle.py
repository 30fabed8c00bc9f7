"""Files in torch.save's format, written tensor by tensor: torch, zipfile and a mapping read what was put in."""

import argparse
import gc
import weakref
import zipfile
from typing import ClassVar, NamedTuple

import pytest
import torch

from checkpoint.pickled_files import read_training_file
from checkpoint.streamed_pickle import write_pickle

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHAPES = ((), (1,), (0, 3), (7,), (3, 5), (2, 3, 1, 4), (129, 65))


class Given(NamedTuple):
    """A tensor that exists already, as what write_pickle takes."""

    tensor: torch.Tensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def load(self) -> torch.Tensor:
        return self.tensor


def drawn() -> dict[str, Given]:
    tensors = {}
    for name, dtype in DTYPES.items():
        for i, shape in enumerate(SHAPES):
            tensors[f"{name}.{i}"] = Given((torch.randn(shape) * 50).to(dtype), name)
    matrix = torch.randn(6, 4)
    return tensors | {"turned": Given(matrix.T, "F32"), "columns": Given(matrix[:, 1:3], "F32")}


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 100], ids=["", "zip64"])
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_torch_reads_the_same_tensors(mmap, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)  # 100 bytes: sizes and offsets go to fields of 64 bits
    torch.manual_seed(0)
    tensors, path = drawn(), tmp_path / "名.pth"
    write_pickle(path, tensors)
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert list(found) == list(tensors)
    for name, given in tensors.items():
        torch.testing.assert_close(found[name], given.tensor, rtol=0, atol=0)
        assert found[name].is_contiguous() and not found[name].requires_grad


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 100], ids=["", "zip64"])
def test_the_archive_is_whole_and_its_numbers_can_be_mapped(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    tensors, path = drawn(), tmp_path / "x.pth"
    write_pickle(path, tensors)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # compares the check sums
        for info in archive.infolist():
            data = archive.read(info)
            head = raw[info.header_offset : info.header_offset + 30]
            at = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            assert at % 64 == 0 and raw[at : at + len(data)] == data and info.compress_type == zipfile.ZIP_STORED


def test_the_pickle_is_the_one_of_torch(tmp_path):
    """Instruction by instruction, so that whatever reads torch's files reads these."""
    tensors = drawn()
    settings = {"args": argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16), "names": ["a", 1, None, 2.5]}
    write_pickle(tmp_path / "ours.pth", settings | {"model": tensors})
    whole = {name: given.tensor.contiguous().clone() for name, given in tensors.items()}
    torch.save(settings | {"model": whole}, tmp_path / "theirs.pth")
    ours, theirs = (zipfile.ZipFile(tmp_path / f"{name}.pth") for name in ("ours", "theirs"))
    assert ours.read("archive/data.pkl") == theirs.read("theirs/data.pkl")
    for i in range(len(tensors)):
        assert ours.read(f"archive/data/{i}") == theirs.read(f"theirs/data/{i}")
    assert ours.read("archive/byteorder") == theirs.read("theirs/byteorder")
    assert ours.read("archive/version") == theirs.read("theirs/version")
    assert read_training_file(tmp_path / "ours.pth")["args"] == settings["args"]


class Counted:
    """A tensor of 40 bytes that is made when it is asked for; `alive` are those that somebody still holds."""

    shape, dtype = (10,), "F32"
    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def load(self) -> torch.Tensor:
        gc.collect()
        assert len(self.alive) <= 1  # the one before, at most
        tensor = torch.ones(10)
        self.alive.add(tensor)
        return tensor


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    write_pickle(tmp_path / "x.pth", {"model": {str(i): Counted() for i in range(5)}})
    assert len(torch.load(tmp_path / "x.pth", weights_only=True)["model"]) == 5


def test_a_tensor_that_is_not_what_it_was_said_to_be_is_named(tmp_path):
    class Short(Counted):
        shape = (11,)

    class Odd(Counted):
        dtype = "Q4_K"

    with pytest.raises(ValueError, match=r"tensor 1 of x.pth should be \(11,\) of F32, found \(10,\)"):
        write_pickle(tmp_path / "x.pth", {"a": Counted(), "b": Short()})
    with pytest.raises(ValueError, match="dtype Q4_K cannot be written"):
        write_pickle(tmp_path / "x.pth", {"a": Odd()})

"""Token files of other programs, read and written by hand from their published layouts."""

import itertools
import pickle
import struct
from array import array
from pathlib import Path

TYPES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}  # codes of both formats -> type codes of `array`


def read_megatron(prefix: Path) -> list[list[list[int]]]:
    """The documents of an indexed dataset, each a list of sequences."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0" and struct.unpack_from("<Q", index, 9) == (1,)
    code, n, n_offsets = struct.unpack_from("<BQQ", index, 17)
    sizes = struct.unpack_from(f"<{n}i", index, 34)
    pointers = struct.unpack_from(f"<{n}q", index, 34 + 4 * n)
    bounds = struct.unpack_from(f"<{n_offsets}q", index, 34 + 12 * n)
    assert len(index) == 34 + 12 * n + 8 * n_offsets and bounds[0] == 0 and bounds[-1] == n
    width = struct.calcsize(TYPES[code])
    sequences = [array(TYPES[code], data[at : at + width * size]).tolist() for at, size in zip(pointers, sizes)]
    return [sequences[a:b] for a, b in itertools.pairwise(bounds)]


def write_megatron(prefix: Path, documents: list[list[list[int]]], code: int) -> None:
    sequences = [sequence for document in documents for sequence in document]
    width, pointers, at = struct.calcsize(TYPES[code]), [], 0
    for sequence in sequences:
        pointers.append(at)
        at += width * len(sequence)
    bounds = [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    n = len(sequences)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, n, len(bounds))
    sizes = struct.pack(f"<{n}i", *map(len, sequences))
    Path(f"{prefix}.idx").write_bytes(
        head + sizes + struct.pack(f"<{n}q", *pointers) + struct.pack(f"<{len(bounds)}q", *bounds)
    )
    Path(f"{prefix}.bin").write_bytes(b"".join(array(TYPES[code], sequence).tobytes() for sequence in sequences))


def read_packed(paths: list[Path]) -> list[int]:
    """The ids of all chunks, with what fills the last one."""
    ids = []
    for path in paths:
        data = path.read_bytes()
        assert data[:7] == b"LITPKDS"
        version, code, n = struct.unpack_from("<QBQ", data, 7)
        assert version == 1 and len(data) == 24 + n * struct.calcsize(TYPES[code])
        ids += array(TYPES[code], data[24:]).tolist()
    return ids


def write_packed(prefix: Path, ids: list[int], size: int, fill: int, code: int) -> None:
    for k in range(-(-len(ids) // size)):
        chunk = ids[k * size : (k + 1) * size]
        chunk += [fill] * (size - len(chunk))
        head = b"LITPKDS" + struct.pack("<QBQ", 1, code, size)
        Path(f"{prefix}_{k:010d}.bin").write_bytes(head + array(TYPES[code], chunk).tobytes())


def write_lite(path: Path, items: list) -> None:
    """As llm-lite-trainer's save_binary_file: pickles one after the other, and a pickle of where they begin."""
    data = [pickle.dumps(item) for item in items]
    path.write_bytes(b"".join(data))
    path.with_suffix(".idx").write_bytes(pickle.dumps([sum(map(len, data[:i])) for i in range(len(data))]))

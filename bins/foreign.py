"""Token files of other programs: which format a path holds, and its documents as a stream.

bins          ours: name.bin, .idx, .json
megatron      Megatron-LM: name.bin, name.idx
packed        lit-gpt, TinyLlama, LitHFT: name_0000000000.bin, ...
lite_trainer  llm-lite-trainer: name_0.bin, name_0.idx, ...
raw           nanoGPT, baby-llama2: name.bin, uint16 without a header
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bins import megatron, packed, pickled_rows
from bins.cut import cut, in_blocks
from bins.token_bin import TokenBin

NAMES = {
    "bins": "token bins of this repository",
    "megatron": "an indexed dataset of Megatron-LM",
    "packed": "packed chunks of lit-gpt",
    "lite_trainer": "data of llm-lite-trainer",
    "raw": "uint16 ids without a header",
}
HELD_OUT = {"val", "valid", "validation", "heldout", "eval"}  # words in the names of files that are not trained on


@dataclass(frozen=True)
class Group:
    """Files that are read one after the other."""

    name: str
    paths: tuple[Path, ...]

    @property
    def role(self) -> str:
        """What the documents are for, by the words of the name: train, heldout or test."""
        words = set(re.split(r"[^a-z]+", self.name.lower()))
        return "heldout" if words & HELD_OUT else "test" if "test" in words else "train"


@dataclass(frozen=True)
class Found:
    """What a path holds."""

    form: str
    groups: tuple[Group, ...]

    def by_role(self) -> dict[str, list[Group]]:
        """Return the groups of each role that there is."""
        roles: dict[str, list[Group]] = {}
        for group in self.groups:
            roles.setdefault(group.role, []).append(group)
        return roles


def find(source: Path) -> Found:
    """Return what is at `source`: a .bin file, its name without .bin, or a directory, whose .bin files have one format.

    Raises FileNotFoundError where there is no .bin file, ValueError for one of no known format.
    """
    one = next((path for path in (source, Path(f"{source}.bin")) if path.is_file()), None)
    if one is None and not source.is_dir():
        raise FileNotFoundError(f"--source {source}: no such file or directory, and no {source}.bin")
    paths = [one] if one else sorted(source.glob("*.bin"), key=natural)
    if not paths:
        raise FileNotFoundError(f"--source {source} has no .bin files")
    forms = {path: form_of(path) for path in paths}
    if len(set(forms.values())) > 1:
        first, other = paths[0], next(path for path in paths if forms[path] != forms[paths[0]])
        raise ValueError(
            f"--source {source} has files of several formats: {first.name} is {NAMES[forms[first]]}, {other.name} is "
            f"{NAMES[forms[other]]}; give one file, or move them apart"
        )
    form = forms[paths[0]]
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(group_name(path, form), []).append(path)
    return Found(form, tuple(Group(name, tuple(each)) for name, each in groups.items()))


def natural(path: Path) -> list[tuple[bool, str, int]]:
    """Return a key by which part_10 stands behind part_9."""
    return [(part.isdigit(), part, int(part) if part.isdigit() else 0) for part in re.split(r"(\d+)", path.name)]


def group_name(path: Path, form: str) -> str:
    """Return the name of the files that `path` belongs to."""
    endings = {"packed": r"_\d{10}$", "lite_trainer": r"_\d+$", "bins": r"_\d{5}$"}
    return re.sub(endings[form], "", path.stem) if form in endings else path.stem


def form_of(path: Path) -> str:
    """Return the format of a .bin file, by its first bytes and the files beside it."""
    index = path.with_suffix(".idx")
    with path.open("rb") as file:
        magic = file.read(len(packed.MAGIC))
    if path.with_suffix(".json").is_file():
        return "bins"
    if magic == packed.MAGIC:
        return "packed"
    if not index.is_file():
        return "raw"
    with index.open("rb") as file:
        magic = file.read(len(megatron.MAGIC))
    if magic == megatron.MAGIC:
        return "megatron"
    if magic[:1] == b"\x80":  # the opcode that a pickle of protocol 2 or later begins with
        return "lite_trainer"
    raise ValueError(
        f"{index} begins with {magic!r}: expected MMIDIDX (Megatron-LM) or a pickle (llm-lite-trainer); it is of "
        "another format, or damaged"
    )


def documents(group: Group, form: str, separator: int, before: bool) -> Iterator[np.ndarray]:
    """Yield the documents of a group of files.

    separator: id that each document ends with (begins with, where `before`) in files without an index of documents
    """
    if form == "bins":
        for path in group.paths:
            yield from of_bin(TokenBin(path))
    elif form == "megatron":
        yield from megatron.read(group.paths[0])
    elif form == "packed":
        yield from packed.read(group.paths, separator, before)
    elif form == "lite_trainer":
        for path in group.paths:
            yield from cut(pickled_rows.blocks(path), separator, path, before)
    else:
        yield from cut(in_blocks(TokenBin(group.paths[0]).tokens), separator, group.paths[0], before)


def of_bin(bin: TokenBin) -> Iterator[np.ndarray]:
    """Yield the documents of one of our bins, each with its eos."""
    ids, offsets = np.asarray(bin.tokens), bin.offsets
    for at in range(0, len(offsets) - 1, 1 << 20):
        bounds = offsets[at : at + (1 << 20) + 1].tolist()
        for first, last in itertools.pairwise(bounds):
            yield ids[first:last]

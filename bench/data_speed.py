"""Measure data_process.py beside Hugging Face `datasets` and `tokenizers` that do the same, at equal ids.

    python bench/data_speed.py --text texts/                                     # 200 MB, one process each
    python bench/data_speed.py --text texts/ --megabytes 2000 --processes 2

Both read the same JSON lines and encode them with the same vocabulary; data_process.py also screens, removes exact
duplicates, and writes bins with their SHA-256. The lines are documents of up to `document_chars` characters, cut from
the files in --text, again and again; each begins with its own number. "<unk>" is left out: for data_process.py it is
text like any other, for `tokenizers` a special token. What was written is compared, id by id.

`MB/s a core` is by the seconds of processor time of all processes, so that another busy program changes it little. The
peak is the sum of resident memory, sampled twenty times a second. Needs --extra eval, or --python of another venv with
`datasets` and `tokenizers`.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from bench.data_memory import PEER, watch
from tokenizer import load_tokenizer

COMPARE = """
import sys
import numpy as np
from datasets import load_from_disk
ours, theirs, dtype = sys.argv[1:]
ids, at = np.memmap(ours, dtype), 0
for batch in load_from_disk(theirs).with_format("arrow").iter(1000):
    part = batch["ids"].combine_chunks().flatten().to_numpy()
    if not np.array_equal(part, ids[at : at + len(part)]):
        sys.exit(f"the ids differ after {at:,}")
    at += len(part)
if at != len(ids):
    sys.exit(f"{len(ids):,} ids and {at:,}")
"""


@dataclass(frozen=True)
class Args:
    """Tokenize the same text by data_process.py and by datasets.map."""

    text: Path
    """folder of .txt files"""
    megabytes: int = 200
    """size of the input"""
    document_chars: int = 1000
    """characters of a document at most; it is cut at the end of a line"""
    vocab_size: int = 16_000
    """of the tokenizer, which is trained on the files first"""
    processes: int = 1
    """of each; the threads of `tokenizers` are off, because each process is to have one core"""
    python: Path = Path(sys.executable)
    """interpreter that has datasets and tokenizers"""
    folder: Path | None = None
    """where to write; None: a temporary folder"""
    peer: bool = True
    """also measure datasets.map, and compare"""


def main(args: Args) -> None:
    """Measure both, compare the ids, and print a table."""
    with tempfile.TemporaryDirectory(prefix="data_speed_", dir=args.folder) as name:
        folder = Path(name)
        train_tokenizer(args, folder)
        count = write_input(args, folder / "input.jsonl")
        print(f"{count:,} documents, {args.megabytes} MB, {args.processes} process(es) each")
        print(f"{'':16}{'seconds':>9}{'core s':>9}{'MB/s':>8}{'MB/s a core':>13}{'peak MB':>9}")
        rates = {name: measure(name, command, args.megabytes) for name, command in commands(args, folder).items()}
        if args.peer:
            ours, theirs = rates.values()
            compare(args, folder)
            print(f"equal ids; data_process.py has {ours / theirs:.2f} times the MB/s a core")


def commands(args: Args, folder: Path) -> dict[str, list[object]]:
    """Return the commands that are compared."""
    flags = ["--input", folder / "input.jsonl", "--tokenizer", folder / "tokenizer", "--out", folder / "ours"]
    flags += ["--processes", args.processes, "--held_out", 0, "--tokens_per_file", 10**12]
    ours = {"data_process.py": [sys.executable, REPOSITORY / "data_process.py", *flags]}
    where = [folder / "input.jsonl", folder / "tokenizer" / "tokenizer.json", folder / "theirs"]
    eos = load_tokenizer(folder / "tokenizer").eos_id
    peer = {"datasets.map": [args.python, "-c", PEER, *where, args.processes, eos]}
    return ours | (peer if args.peer else {})


def measure(name: str, command: list[object], megabytes: int) -> float:
    """Run a command, print its row, and return its MB a second of processor time."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peaks = watch(name, command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rate = megabytes / busy
    numbers = f"{peaks['seconds']:>9.1f}{busy:>9.1f}{megabytes / peaks['seconds']:>8.2f}{rate:>13.2f}"
    print(f"{name:16}{numbers}{peaks['all']:>9.0f}", flush=True)
    return rate


def compare(args: Args, folder: Path) -> None:
    """Exit where the ids of the two differ."""
    dtype = json.loads((folder / "ours" / "train_00000.json").read_text())["dtype"]
    command = [args.python, "-c", COMPARE, folder / "ours" / "train_00000.bin", folder / "theirs" / "tokens", dtype]
    watch("the comparison", command)


# ---- the text


def documents(args: Args) -> Iterator[str]:
    """Yield the documents of the files, for ever, each time with other numbers."""
    paths = sorted(args.text.glob("*.txt"))
    if not paths:
        sys.exit(f"error: --text {args.text} should be a folder of .txt files, found none")
    numbers = itertools.count()
    while True:
        for path in paths:
            text = f"Document {next(numbers)}. "  # longer than what data_process.py drops
            for row in path.read_text(encoding="utf8").replace("<unk>", "").splitlines():
                for part in (row[at : at + args.document_chars] for at in range(0, len(row), args.document_chars)):
                    if len(text) + len(part) > args.document_chars:
                        yield text
                        text = f"Document {next(numbers)}. "
                    text += part + "\n"
            yield text


def write_input(args: Args, path: Path) -> int:
    """Write JSON lines of the wanted size; return the number of documents."""
    written, count = 0, 0
    with path.open("wb") as file:
        for text in documents(args):
            written += file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            count += 1
            if written >= args.megabytes * 1_000_000:
                return count


def train_tokenizer(args: Args, folder: Path) -> None:
    """Train a tokenizer on the files, and write it to folder/tokenizer."""
    flags = ["--input", args.text, "--out", folder / "tokenizer", "--vocab_size", args.vocab_size]
    watch("train_tokenizer.py", [sys.executable, REPOSITORY / "train_tokenizer.py", *flags])


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, config=(tyro.conf.FlagConversionOff,)))

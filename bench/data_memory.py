"""Measure memory and speed of data_process.py for inputs of several sizes: neither should depend on the size.

    python bench/data_memory.py                       # 10 and 100 MB
    python bench/data_memory.py --sizes 10 100 1000   # and 1 GB: minutes

Peaks are sums of resident memory (pages that processes share are counted in each), sampled twenty times a second.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tyro

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from cli.extras import need

need("bench/data_memory.py", "bench", "psutil")
import psutil


@dataclass(frozen=True)
class Args:
    """Run data_process.py on random texts of several sizes and print its memory and time."""

    sizes: tuple[int, ...] = (10, 100)
    """sizes of the input, in MB"""
    document_chars: int = 600
    """characters of a document; half of its sentences are Chinese"""
    processes: int = os.cpu_count() or 1
    """worker processes of data_process.py"""
    tokenizer: Path | None = None
    """tokenizer; None: a SentencePiece model of 4000 pieces is trained first"""
    deduplicate: bool = True
    """drop duplicate documents"""


def main(args: Args) -> None:
    """Measure every size and print a table."""
    print(" input MB  documents  main MB  workers MB  all MB  seconds   MB/s")
    with tempfile.TemporaryDirectory(prefix="data_memory_") as name:
        folder = Path(name)
        tokenizer = args.tokenizer or train_tokenizer(folder)
        for megabytes in args.sizes:
            path = folder / "input.jsonl"
            n_documents = write_input(path, megabytes * 1_000_000, args.document_chars)
            flags = ["--input", path, "--tokenizer", tokenizer, "--out", folder / f"out{megabytes}"]
            flags += ["--processes", args.processes, "--deduplicate", args.deduplicate]
            began = time.monotonic()
            peaks = watch([sys.executable, REPOSITORY / "data_process.py", *flags])
            seconds = time.monotonic() - began
            memory = f"{peaks['main']:>8.0f} {peaks['workers']:>11.0f} {peaks['all']:>7.0f}"
            print(f"{megabytes:>9} {n_documents:>10,} {memory} {seconds:>8.1f} {megabytes / seconds:>6.1f}", flush=True)


def watch(command: list[object]) -> dict[str, float]:
    """Run a command to its end; return its peak resident memory, that of its children, and of all, in MB."""
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    main, peaks = psutil.Process(process.pid), {"main": 0.0, "workers": 0.0, "all": 0.0}
    while process.poll() is None:
        own, workers = resident(main), 0.0
        for child in children(main):
            workers += resident(child)
        for name, value in (("main", own), ("workers", workers), ("all", own + workers)):
            peaks[name] = max(peaks[name], value / 1e6)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"error: data_process.py ended with status {process.returncode}")
    return peaks


def children(process: psutil.Process) -> list[psutil.Process]:
    """Return all descendants; none for a process that has just ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def resident(process: psutil.Process) -> int:
    """Return the resident memory in bytes; 0 for a process that has just ended."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def sentences(count: int, seed: int) -> list[str]:
    """Return random sentences, half of them of Chinese characters, with word frequencies that fall as in a language."""
    rng = random.Random(seed)
    characters = [chr(0x4E00 + i) for i in range(3000)]
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    weights = [[1 / (rank + 3) for rank in range(n)] for n in (len(characters), len(words))]
    chinese = ["".join(rng.choices(characters, weights[0], k=rng.randint(8, 40))) + "。" for _ in range(count // 2)]
    english = [" ".join(rng.choices(words, weights[1], k=rng.randint(5, 20))) + ". " for _ in range(count // 2)]
    return chinese + english


def write_input(path: Path, size: int, document_chars: int) -> int:
    """Write JSON lines of `size` bytes, every document another mixture of sentences; return the number of documents."""
    pool, rng, written, count = sentences(20_000, seed=1), random.Random(2), 0, 0
    per_document = max(1, round(document_chars / (sum(map(len, pool)) / len(pool))))
    with path.open("wb") as file:
        while written < size:
            text = f"{count}: " + "".join(rng.choices(pool, k=per_document))
            written += file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def train_tokenizer(folder: Path) -> Path:
    """Train a SentencePiece model on random sentences; return its path."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(4000, seed=3)),
        model_writer=model,
        model_type="bpe",
        vocab_size=4000,
        byte_fallback=True,
        minloglevel=2,
    )
    path = folder / "bench.model"
    path.write_bytes(model.getvalue())
    return path


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, config=(tyro.conf.FlagConversionOff,)))

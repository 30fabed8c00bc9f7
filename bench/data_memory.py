"""Measure memory and speed of data_process.py for inputs of several sizes: neither should depend on the size.

    python bench/data_memory.py                       # 10 and 100 MB
    python bench/data_memory.py --sizes 10 100 1000   # and 1 GB: minutes
    python bench/data_memory.py --peer True           # beside Hugging Face datasets and tokenizers; needs --extra eval

Peaks are sums of resident memory (pages that processes share are counted in each), sampled twenty times a second.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
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

from tokenizer import load_tokenizer

PARTS = ("main", "workers", "all")


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
    near_duplicates: float = 0.0
    """drop near-duplicates from this similarity on; needs --extra data"""
    peer: bool = False
    """also tokenize the same file with the same tokenizer by datasets.map, to Arrow files"""
    repeats: int = 1
    """runs of each, in turns; the table has the fastest"""


PEER = """
import sys
from datasets import load_dataset
from tokenizers import Tokenizer
path, tokenizer, out, processes, eos = sys.argv[1:]
encode = Tokenizer.from_file(tokenizer).encode_batch_fast
def ids(rows):
    return {"ids": [[*each.ids, int(eos)] for each in encode(rows["text"], add_special_tokens=False)]}
data = load_dataset("json", data_files=path, split="train", cache_dir=out + "/cache")
several = int(processes) if int(processes) > 1 else None
data.map(ids, batched=True, remove_columns=["text"], num_proc=several).save_to_disk(out + "/tokens")
"""


def main(args: Args) -> None:
    """Measure every size and print a table."""
    if args.peer:
        need("bench/data_memory.py --peer True", "eval", "datasets")
    print(" input MB  documents  main MB  workers MB  all MB  seconds   MB/s  MB/s a process")
    with tempfile.TemporaryDirectory(prefix="data_memory_") as name:
        folder = Path(name)
        tokenizer = load_tokenizer(args.tokenizer or train_tokenizer(folder))
        tokenizer.save(folder / "tokenizer")  # the same tokenizer.json for both
        for megabytes in args.sizes:
            path = folder / "input.jsonl"
            n_documents = write_input(path, megabytes * 1_000_000, args.document_chars)
            runs: dict[str, list[dict[str, float]]] = {}
            for _ in range(args.repeats):
                for name, command in commands(args, folder, path, tokenizer.eos_id).items():
                    runs.setdefault(name, []).append(watch(name, command))
                    shutil.rmtree(folder / "out")
            for name, peaks in runs.items():
                seconds = min(each["seconds"] for each in peaks)
                main_mb, workers, whole = (max(each[part] for each in peaks) for part in PARTS)
                memory = f"{main_mb:>8.0f} {workers:>11.0f} {whole:>7.0f}"
                rate = megabytes / seconds
                numbers = f"{megabytes:>9} {n_documents:>10,} {memory} {seconds:>8.1f} {rate:>6.1f}"
                print(f"{numbers} {rate / args.processes:>15.2f}  {name}", flush=True)


def commands(args: Args, folder: Path, path: Path, eos_id: int) -> dict[str, list[object]]:
    """Return the commands that are compared, each of which writes to folder/out."""
    flags = ["--input", path, "--tokenizer", folder / "tokenizer", "--out", folder / "out"]
    flags += ["--processes", args.processes, "--deduplicate", args.deduplicate]
    flags += ["--near_duplicates", args.near_duplicates] if args.near_duplicates else []
    ours = {"data_process.py": [sys.executable, REPOSITORY / "data_process.py", *flags]}
    where = [path, folder / "tokenizer" / "tokenizer.json", folder / "out", args.processes, eos_id]
    return ours | ({"datasets.map": [sys.executable, "-c", PEER, *where]} if args.peer else {})


def watch(name: str, command: list[object]) -> dict[str, float]:
    """Run a command to its end; return its peak resident memory, that of its children, and of all, in MB; seconds."""
    began, peaks = time.monotonic(), dict.fromkeys(PARTS, 0.0)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=said)
        main = psutil.Process(process.pid)
        while process.poll() is None:
            own, workers = resident(main), 0.0
            for child in children(main):
                workers += resident(child)
            for part, value in zip(PARTS, (own, workers, own + workers)):
                peaks[part] = max(peaks[part], value / 1e6)
            time.sleep(0.05)
        if process.returncode:
            said.seek(0)
            words = said.read().decode(errors="replace")[-2000:]
            sys.exit(f"error: {name} ended with status {process.returncode}: {words}")
    return peaks | {"seconds": time.monotonic() - began}


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

"""Write the output files of data_process.py.

They are written in a working folder, survive a kill of the process, and move to `out` when they are complete:

out/train_00000.bin ...    training bins, each with .idx and .json
out/heldout.bin            the held-out bin, with .idx and .json
out/sft_train.jsonl, out/sft_heldout.jsonl, out/bad_records.jsonl, out/all_text.txt
out/examples.txt           what to ask a model that is trained on the conversations
out/summary.json           counts, file sizes, and the inputs and arguments of the run; written last
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bins.token_bin import BinWriter, hash_of, open_at
from cli.progress import say
from corpora import BadRecord, Conversation, Document
from files import digest_of, json_line, read_json, read_sealed, write_json
from tokenizer import Tokenizer

OUTPUTS = (  # in the order they are moved: a bin's .json last, because it marks the bin as complete
    *(f"{name}.{suffix}" for name in ("train_[0-9]*", "heldout") for suffix in ("idx", "bin", "json")),
    *("sft_train.jsonl", "sft_heldout.jsonl", "bad_records.jsonl", "all_text.txt", "examples.txt"),
)


class Outputs:
    """The files of a run while they are written in `folder`.

    `state()` returns their sizes; a later run that passes this dict as `state` continues from there.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, tokens_per_file: int, save_all_text: bool, state: dict[str, Any]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokens_per_file, self.save_all_text = folder, tokens_per_file, save_all_text
        self._bin = partial(
            BinWriter,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer.sha256(),
            bos=tokenizer.begins,
        )
        self.shard = state.get("shard", 0)
        self.train = self._bin(self._train_prefix(), state=state.get("train"))
        self.heldout = self._bin(folder / "heldout", state=state.get("heldout"))
        self.bad = HashedFile(folder / "bad_records.jsonl", state.get("bad", 0))
        self.text = HashedFile(folder / "all_text.txt", state.get("text", 0))
        self.finished: dict[str, list] = state.get("finished", {})  # name -> bytes and SHA-256 of files that are closed

    def add(self, document: Document, ids: np.ndarray) -> int:
        """Write one document to the held-out or the training bin; returns the size of its text in UTF-8 bytes."""
        text = document.text.encode("utf8")
        if document.held_out:
            self.heldout.add(ids, document.source, len(text))
            return len(text)
        # A document lies in one bin: start a new bin if this one would exceed the limit.
        if self.train.documents and self.train.tokens + len(ids) > self.tokens_per_file:
            self._close(self.train)
            self.shard += 1
            self.train = self._bin(self._train_prefix())
        self.train.add(ids, document.source, len(text))
        if self.save_all_text:
            self.text.write(text + b"\n\n")
        return len(text)

    def add_bad(self, record: BadRecord) -> None:
        """Write a bad record to bad_records.jsonl."""
        self.bad.write(json_line(vars(record)))

    def state(self) -> dict[str, Any]:
        """Flush all files to the disk and return their sizes, and the SHA-256 of all that was written."""
        for file in (self.bad, self.text):
            file.sync()
        return {
            "shard": self.shard,
            "train": self.train.state(),
            "heldout": self.heldout.state(),
            "bad": self.bad.size,
            "text": self.text.size,
            "finished": self.finished,
            "sums": self.train.sums() | self.heldout.sums() | self.bad.sums() | self.text.sums(),
        }

    def close(self) -> None:
        """Finish all files and remove the empty ones."""
        self._close(self.train)
        self._close(self.heldout)
        for file in (self.bad, self.text):
            file.close()
            self.finished |= file.sums() if file.size else {}

    def _close(self, writer: BinWriter) -> None:
        if not writer.documents:
            writer.discard()
            return
        sums = {name.removesuffix(".part"): each for name, each in writer.sums().items()}
        writer.close()
        self.finished |= sums | sums_of([writer.prefix.with_name(writer.prefix.name + ".json")])

    def _train_prefix(self) -> Path:
        return self.folder / f"train_{self.shard:05d}"


class HashedFile:
    """A file that is written from byte `size` on, with the SHA-256 of all its bytes."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self._file = path, size, open_at(path, size)
        self._hash = hash_of(path, size)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; an empty one is removed."""
        self._file.close()
        if not self.size:
            self.path.unlink()

    def sums(self) -> dict[str, list]:
        """Return the file's name with its bytes and their SHA-256."""
        return {self.path.name: [self.size, self._hash.hexdigest()]}


def sums_of(paths: Iterable[Path]) -> dict[str, list]:
    """Return the bytes and the SHA-256 of files by name."""
    return {path.name: [path.stat().st_size, hash_of(path).hexdigest()] for path in paths}


def damaged_output(folders: Iterable[Path], outputs: dict[str, Any]) -> str | None:
    """Return, in words, what of the files that an interrupted run has written is not there any more; None: nothing.

    folders: where each file may lie; outputs: what `Outputs.state` returned. A file may be longer by now.
    """
    for name, (size, sha256) in (outputs.get("sums", {}) | outputs.get("finished", {})).items():
        names = (name, name.removesuffix(".part"))  # a bin may have been closed since
        path = next((folder / each for folder in folders for each in names if (folder / each).is_file()), None)
        if path is None and size:
            return f"{name} is missing"
        if path is not None and hash_of(path, size).hexdigest() != sha256:
            return f"{path} is damaged (its SHA-256 is not that of what was written)"
    return None


def write_conversations(conversations: Iterable[Conversation], folder: Path) -> dict[str, int]:
    """Write conversations to `sft_train.jsonl` and `sft_heldout.jsonl`; returns the number of lines of each.

    A line is `{"messages": [...], "task": ...}`.
    """
    paths = {"train": folder / "sft_train.jsonl", "held_out": folder / "sft_heldout.jsonl"}
    counts = dict.fromkeys(paths, 0)
    with paths["train"].open("wb") as train, paths["held_out"].open("wb") as held_out:
        for conversation in conversations:
            line = json_line({"messages": conversation.messages, "task": conversation.task})
            (held_out if conversation.held_out else train).write(line)
            counts["held_out" if conversation.held_out else "train"] += 1
    for name, path in paths.items():
        if not counts[name]:
            path.unlink()
    return counts


def read_summary(out: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the summary of `out` if a run with the same inputs and arguments completed it; None otherwise.

    Raises ValueError when `out` holds the files of other inputs or arguments and `overwrite` is False.
    """
    summary = read_json(out / "summary.json")
    if summary and summary.pop("sha256", digest_of(summary)) != digest_of(summary):
        raise ValueError(f"{out / 'summary.json'} is damaged: copy it again, or remove it and add --overwrite true")
    if summary and summary["made_from"] == made_from:
        sizes = {path.name: path.stat().st_size for path in outputs_in(out)}
        return summary if sizes == summary["files"] else None
    if (summary or outputs_in(out)) and not overwrite:
        other = f"with other {differences(summary['made_from'], made_from)}" if summary else "by another program"
        raise ValueError(f"{out} holds bins made {other}; choose another --out, or replace them: --overwrite true")
    return None


def read_checkpoint(work: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the checkpoint that an interrupted run left in `work`; None, with `work` removed, if there is none.

    None, too, where what that run has written is damaged, which is named: its inputs are there, so it is made anew.
    Raises ValueError when that run had other inputs or arguments and `overwrite` is False.
    """
    try:
        progress = read_sealed(work / "progress.json")
    except ValueError as error:
        say(f"{error}: all is made anew")
        progress = None
    if progress and progress["made_from"] == made_from:
        wrong = damaged_output((work, work.parent), progress["outputs"])
        if wrong is None:
            say(f"continuing in {work} after {progress['items']} records")
            return progress
        say(f"{wrong}: all is made anew")
        if "summary" in progress:  # some files may have been moved already
            for path in outputs_in(work.parent):
                path.unlink()
        progress = None
    if progress and not overwrite:
        other = differences(progress["made_from"], made_from)
        raise ValueError(
            f"{work} holds an unfinished run with other {other}; finish that run, or discard it: --overwrite true"
        )
    shutil.rmtree(work, ignore_errors=True)
    return None


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the names of the arguments that differ between two runs, as "a, b"."""
    return ", ".join(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))


def publish(work: Path, out: Path, summary: dict[str, Any]) -> None:
    """Move the files from `work` to `out` and remove older ones; after a kill at any point it can be called again."""
    (out / "summary.json").unlink(missing_ok=True)
    remaining = [name for name in summary["files"] if (work / name).exists()]  # not moved by an earlier call
    for path in outputs_in(out):
        # Remove an older .json first: after the move it would describe the new tokens wrongly.
        if path.name not in summary["files"] or (path.suffix == ".json" and path.name in remaining):
            path.unlink()
    for name in remaining:
        (work / name).replace(out / name)
    write_json(out / "summary.json", summary | {"sha256": digest_of(summary)})
    shutil.rmtree(work)


def outputs_in(folder: Path) -> list[Path]:
    """Return the output files in `folder`, in the order of OUTPUTS."""
    return [path for pattern in OUTPUTS for path in sorted(folder.glob(pattern))]

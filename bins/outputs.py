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

from bins.token_bin import BinWriter, open_at
from cli.progress import say
from corpora import BadRecord, Conversation, Document
from files import json_line, read_json, write_json
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
        self.bad = open_at(folder / "bad_records.jsonl", state.get("bad", 0))
        self.text = open_at(folder / "all_text.txt", state.get("text", 0))

    def add(self, document: Document, ids: np.ndarray) -> int:
        """Write one document to the held-out or the training bin; returns the size of its text in UTF-8 bytes."""
        text = document.text.encode("utf8")
        if document.held_out:
            self.heldout.add(ids, document.source, len(text))
            return len(text)
        # A document lies in one bin: start a new bin if this one would exceed the limit.
        if self.train.documents and self.train.tokens + len(ids) > self.tokens_per_file:
            self.train.close()
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
        """Flush all files to the disk and return their sizes."""
        for file in (self.bad, self.text):
            file.flush()
            os.fsync(file.fileno())
        train, heldout = self.train.state(), self.heldout.state()
        return {
            "shard": self.shard,
            "train": train,
            "heldout": heldout,
            "bad": self.bad.tell(),
            "text": self.text.tell(),
        }

    def close(self) -> None:
        """Finish all files and remove the empty ones."""
        for writer in (self.train, self.heldout):
            if writer.documents:
                writer.close()
            else:
                writer.discard()
        for file in (self.bad, self.text):
            file.close()
            if not Path(file.name).stat().st_size:
                Path(file.name).unlink()

    def _train_prefix(self) -> Path:
        return self.folder / f"train_{self.shard:05d}"


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
    if summary and summary["made_from"] == made_from:
        sizes = {path.name: path.stat().st_size for path in outputs_in(out)}
        return summary if sizes == summary["files"] else None
    if (summary or outputs_in(out)) and not overwrite:
        other = f"with other {differences(summary['made_from'], made_from)}" if summary else "by another program"
        raise ValueError(f"{out} holds bins made {other}; choose another --out, or replace them: --overwrite true")
    return None


def read_checkpoint(work: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the checkpoint that an interrupted run left in `work`; None, with `work` removed, if there is none.

    Raises ValueError when that run had other inputs or arguments and `overwrite` is False.
    """
    progress = read_json(work / "progress.json")
    if progress and progress["made_from"] == made_from:
        say(f"continuing in {work} after {progress['items']} records")
        return progress
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
    write_json(out / "summary.json", summary)
    shutil.rmtree(work)


def outputs_in(folder: Path) -> list[Path]:
    """Return the output files in `folder`, in the order of OUTPUTS."""
    return [path for pattern in OUTPUTS for path in sorted(folder.glob(pattern))]

"""The files of a data_process run: they grow in a folder aside, outlive a kill, and are published when whole.

out/train_00000.bin ...    training bins, with .idx and .json
out/heldout.bin            the held-out bin
out/sft_train.jsonl, out/sft_heldout.jsonl, out/bad_records.jsonl, out/all_text.txt
out/summary.json           counts, the sizes of all of these, and what they were made from; comes last
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
from corpora import BadRecord, Conversation, Document
from files import json_line, read_json, write_json
from tokenizer import Tokenizer

OUTPUTS = (  # a bin's .json after its .bin: it seals it
    *(f"{name}.{suffix}" for name in ("train_[0-9]*", "heldout") for suffix in ("idx", "bin", "json")),
    *("sft_train.jsonl", "sft_heldout.jsonl", "bad_records.jsonl", "all_text.txt"),
)


class Outputs:
    """The files of a run, growing in `folder`; `state()` says where they stand, which is where another run goes on."""

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
        )
        self.shard = state.get("shard", 0)
        self.train = self._bin(self._train_prefix(), state=state.get("train"))
        self.heldout = self._bin(folder / "heldout", state=state.get("heldout"))
        self.bad = open_at(folder / "bad_records.jsonl", state.get("bad", 0))
        self.text = open_at(folder / "all_text.txt", state.get("text", 0))

    def add(self, document: Document, ids: np.ndarray) -> int:
        """Write one document where it belongs, after closing a training bin it would fill too far; its UTF-8 length."""
        text = document.text.encode("utf8")
        if document.held_out:
            self.heldout.add(ids, document.source, len(text))
            return len(text)
        if self.train.documents and self.train.tokens + len(ids) > self.tokens_per_file:
            self.train.close()
            self.shard += 1
            self.train = self._bin(self._train_prefix())
        self.train.add(ids, document.source, len(text))
        if self.save_all_text:
            self.text.write(text + b"\n\n")
        return len(text)

    def add_bad(self, record: BadRecord) -> None:
        """Keep a bad record aside."""
        self.bad.write(json_line(vars(record)))

    def state(self) -> dict[str, Any]:
        """Everything safe on disk, and the sizes it has there."""
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
        """Finish all files; those nothing was written to are removed."""
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
    """`sft_train.jsonl`, `sft_heldout.jsonl`: a `{"messages": [...], "task": ...}` a line; returns how many each."""
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


def finished(out: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The summary of `out` when it is whole and was made from the same; None when there is something to do.

    Raises ValueError when `out` holds files made from something else, unless they are to be overwritten.
    """
    summary = read_json(out / "summary.json")
    if summary and summary["made_from"] == made_from:
        sizes = {path.name: path.stat().st_size for path in outputs_in(out)}
        return summary if sizes == summary["files"] else None
    if (summary or outputs_in(out)) and not overwrite:
        other = differences(summary["made_from"], made_from) if summary else "programs"
        raise ValueError(
            f"{out} holds bins made with other {other}; give another --out, or replace them: --overwrite true"
        )
    return None


def unfinished(work: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The checkpoint that an interrupted run left in `work`, None when there is none to go on from.

    Raises ValueError when that run had other arguments, unless it is to be dropped.
    """
    progress = read_json(work / "progress.json")
    if progress and progress["made_from"] == made_from:
        print(f"going on in {work} after {progress['items']} records")
        return progress
    if progress and not overwrite:
        other = differences(progress["made_from"], made_from)
        raise ValueError(
            f"{work} holds an unfinished run with other {other}; finish that one, or drop it: --overwrite true"
        )
    shutil.rmtree(work, ignore_errors=True)
    return None


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The names of the arguments in which two descriptions differ."""
    return ", ".join(sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))


def publish(work: Path, out: Path, summary: dict[str, Any]) -> None:
    """Move the files from `work` to `out` in place of older ones. May be killed at any point, and run again."""
    (out / "summary.json").unlink(missing_ok=True)
    coming = [name for name in summary["files"] if (work / name).exists()]
    for path in outputs_in(out):
        # An older .json left standing would describe the new tokens, once they have moved.
        if path.name not in summary["files"] or (path.suffix == ".json" and path.name in coming):
            path.unlink()
    for name in coming:
        (work / name).replace(out / name)
    write_json(out / "summary.json", summary)
    shutil.rmtree(work)


def outputs_in(folder: Path) -> list[Path]:
    """Those files of a run that `folder` holds, in the order they are moved."""
    return [path for pattern in OUTPUTS for path in sorted(folder.glob(pattern))]

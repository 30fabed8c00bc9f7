"""Corpora -> token bins: each document becomes ids once, training only maps them.

Documents are written in the order they are read, so the files are the same, byte for byte, for any number of processes,
and whether or not the run was killed on the way: everything grows in `out/data_process.part/` beside a checkpoint, and
moves to `out/` when it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bins.outputs import Outputs, finished, outputs_in, publish, unfinished, write_conversations
from bins.screen import Batch, screen
from bins.tokenize import tokenize
from cli.args import parse, run
from cli.progress import Progress, track
from cli.record import record_run, to_plain
from corpora import BadRecord, Document, SourceArgs, read, read_conversations, text_size
from corpora.files import find_files
from files import alone_in, write_json
from tokenizer import Tokenizer, load_tokenizer

CHECKPOINT_SECONDS = 10.0
TABLE_ROWS = 20
COUNTS = ("documents", "held_out", "tokens", "characters", "bytes", "too_short", "duplicate", "bad")


@dataclass(frozen=True)
class Args(SourceArgs):
    """Turn corpora into token bins, out/train_00000.bin ... and out/heldout.bin, conversations into out/sft_*.jsonl."""

    tokenizer: Path = Path("data/tiny/tokenizer")
    """A tokenizer directory, a SentencePiece .model or a tokenizer.json."""
    out: Path = Path("data/tiny")
    """Where the bins go."""
    processes: int = os.cpu_count() or 1
    """Tokenizing processes; 1 tokenizes in the main process. The output does not depend on it."""
    tokens_per_file: int = 100_000_000
    """A new training bin begins where the next document would pass this; documents are never cut."""
    held_out: float = 0.01
    """Share of documents never trained on, chosen by the hash of their text; a corpus with its own split keeps it."""
    min_chars: int = 10
    """Documents with fewer characters, spaces around them not counted, are dropped, and empty ones always."""
    deduplicate: bool = True
    """Drop exact duplicates, by hash: 16 MB of memory per million documents, twice that for moments."""
    save_all_text: bool = False
    """Also write the training documents to out/all_text.txt, a blank line after each, to train a tokenizer on."""
    overwrite: bool = False
    """Replace what out holds from other inputs or arguments."""


def main(args: Args) -> dict[str, Any]:
    """Write the bins and return what `out/summary.json` holds: counts per source, files and their sizes."""
    check(args)
    tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer.eos_id is None:
        raise ValueError(f"{args.tokenizer} has no end-of-text token, which every document in a bin ends with")
    items = read(args)
    with alone_in(args.out):
        return make(args, items, tokenizer)


def make(args: Args, items: Iterable[Document | BadRecord], tokenizer: Tokenizer) -> dict[str, Any]:
    """All of the work, as far as it was not done before."""
    inputs = input_files(args)
    made_from = describe(args, tokenizer, inputs)
    work = args.out / "data_process.part"
    progress = unfinished(work, made_from, args.overwrite)
    if progress is None:
        summary = finished(args.out, made_from, args.overwrite)
        if summary:
            print(f"{args.out} was already made from these inputs with these arguments: nothing to do")
            return summary
        progress = {"made_from": made_from, "items": 0, "sources": {}, "outputs": {}}
    if "summary" not in progress:
        try:
            progress["summary"] = process(args, items, tokenizer, work, progress)
            write_json(work / "progress.json", progress)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(f"no room for {work} ({error}); make some, and the same command goes on") from error
            raise
        finally:
            if not (work / "progress.json").exists():  # nothing there that another run could go on from
                shutil.rmtree(work, ignore_errors=True)
    record_run(args.out, "data_process", args, inputs)
    publish(work, args.out, progress["summary"])
    print_table(progress["summary"], args.out)
    return progress["summary"]


def check(args: Args) -> None:
    """Raise ValueError for arguments that make no sense, before any work."""
    if args.processes < 1 or args.tokens_per_file < 1:
        raise ValueError(f"processes ({args.processes}) and tokens_per_file ({args.tokens_per_file}) are at least 1")
    if args.min_chars < 0:
        raise ValueError(f"min_chars is 0 or more, found {args.min_chars}")
    if not 0 <= args.held_out < 1:
        raise ValueError(f"held_out is a share of the documents, at least 0 and below 1, found {args.held_out}")
    for path in args.input:
        if args.out.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"--out {args.out} lies in the input {path}, and would be read as input the next time")


def process(
    args: Args, items: Iterable[Document | BadRecord], tokenizer: Tokenizer, work: Path, progress: dict[str, Any]
) -> dict[str, Any]:
    """From where `progress` stands in the stream `items` to its end: every file, in `work`, and the summary."""
    counts = {name: Counter(found) for name, found in progress["sources"].items()}
    batches = screen(items, min_chars=args.min_chars, held_out=args.held_out, deduplicate=args.deduplicate)
    outputs = Outputs(work, tokenizer, args.tokens_per_file, args.save_all_text, progress["outputs"])
    done = sum(found["bytes"] for found in counts.values())
    shown = Progress("tokenizing", "B", text_size(args), done)
    saved_at, saved_shard = time.monotonic(), outputs.shard
    for batch, documents in tokenize(behind(batches, progress["items"]), tokenizer, args.processes):
        for document, ids in zip(batch.documents, documents):
            n_bytes = outputs.add(document, ids)
            found = {"documents": 1, "held_out": int(document.held_out), "tokens": len(ids), "bytes": n_bytes}
            batch.count(document.source, **found, characters=len(document.text))
        for record in batch.bad:
            outputs.add_bad(record)
            batch.count(source_of(record, args), bad=1)
        for name, found in batch.counts.items():
            counts.setdefault(name, Counter()).update(found)
        shown.add(sum(found["bytes"] for found in batch.counts.values()))
        if outputs.shard != saved_shard or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            progress |= {"items": batch.end, "sources": counts, "outputs": outputs.state()}
            write_json(work / "progress.json", progress)
            saved_at, saved_shard = time.monotonic(), outputs.shard
    shown.close()
    outputs.close()
    conversations = write_conversations(track(read_conversations(args), "writing", "conversations"), work)
    summary = summarize(counts, conversations, progress["made_from"], work)
    if not any(name.startswith(("train_", "sft_train")) for name in summary["files"]):
        reasons = why_nothing(summary["total"], work)
        shutil.rmtree(work)
        raise ValueError(f"nothing to train on ({reasons}); {args.out} is left as it was")
    return summary


def behind(batches: Iterable[Batch], done: int) -> Iterator[Batch]:
    """The batches behind the first `done` items of the stream, which have to be read again to know what was seen."""
    shown = Progress("reading again what is done", "records", done, active=done > 0)
    for batch in batches:
        if batch.end > done:
            shown.close()
            yield batch
        else:
            shown.add(batch.end - shown.done)


def source_of(record: BadRecord, source: SourceArgs) -> str:
    """What a bad record is counted under: as the documents of the file or folder that it lies in are."""
    given = (path.name for path in input_paths(source) if record.where.startswith(str(path)))
    return next(given, record.where.rpartition(":")[0] or record.where)


def input_paths(source: SourceArgs) -> list[Path]:
    """The user's own files and folders: those given, the loader, and those of named corpora that are not fetched."""
    folders = [source.raw_dir / corpus.name for corpus in source.corpora()]
    loader = [source.loader] if source.loader else []
    return [*source.input, *loader, *(folder for folder in folders if folder.is_dir())]


def input_files(source: SourceArgs) -> list[Path]:
    """All files in `input_paths`."""
    return [file for path in input_paths(source) for file in ([path] if path == source.loader else find_files(path))]


def describe(args: Args, tokenizer: Tokenizer, inputs: list[Path]) -> dict[str, Any]:
    """All that decides what the bins hold, as JSON gives it back: two runs that agree here write the same bytes."""
    plain = to_plain(args)
    for name in ("tokenizer", "out", "processes", "overwrite"):
        del plain[name]
    stats = {str(path): path.stat() for path in inputs}
    plain["inputs"] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return plain | {"tokenizer_sha256": tokenizer.sha256()}


def summarize(
    counts: dict[str, Counter], conversations: dict[str, int], made_from: dict[str, Any], work: Path
) -> dict[str, Any]:
    """The summary: counts per source and in all, and the files with their sizes."""
    total: Counter = Counter()
    for found in counts.values():
        total.update(found)
    return {
        "sources": {name: with_ratio(found) for name, found in counts.items()},
        "total": with_ratio(total),
        "conversations": conversations,
        "files": {path.name: path.stat().st_size for path in outputs_in(work)},
        "made_from": made_from,
    }


def with_ratio(found: Counter) -> dict[str, Any]:
    ratio = round(found["characters"] / found["tokens"], 3) if found["tokens"] else None
    return {name: found[name] for name in COUNTS} | {"characters_per_token": ratio}


def why_nothing(total: dict[str, Any], work: Path) -> str:
    """What became of all records, in words, and the first bad one."""
    dropped = {key: total[key] for key in ("held_out", "too_short", "duplicate", "bad") if total[key]}
    words = [f"{count} {key.replace('_', ' ')}" for key, count in dropped.items()] or ["no documents at all"]
    if total["bad"]:
        words[-1] += f", the first at {first_bad(work)}"
    return ", ".join(words)


def first_bad(folder: Path) -> str:
    """Place and reason of the first record that was kept aside."""
    with (folder / "bad_records.jsonl").open(encoding="utf8") as file:
        first = json.loads(file.readline())
    return f"{first['where']}: {first['reason']}"


def print_table(summary: dict[str, Any], out: Path) -> None:
    """What became of each source, largest first, on stdout."""
    keys = ("documents", "held_out", "tokens", "characters_per_token", "too_short", "duplicate", "bad")
    heads = ("documents", "held out", "tokens", "chars/token", "too short", "duplicate", "bad")
    rows = sorted(summary["sources"].items(), key=lambda row: -row[1]["tokens"])
    shown = [*rows[:TABLE_ROWS], ("all", summary["total"])]
    width = max(len(name) for name, _ in shown)
    print("  ".join([" " * width, *(f"{head:>11}" for head in heads)]))
    for name, found in shown:
        values = ("-" if found[key] is None else f"{found[key]:,}" for key in keys)
        print("  ".join([f"{name:<{width}}", *(f"{value:>11}" for value in values)]))
    if len(rows) > TABLE_ROWS:
        print(f"({len(rows) - TABLE_ROWS} smaller sources are in {out / 'summary.json'})")
    if summary["total"]["bad"]:
        print(f"bad records lie in {out / 'bad_records.jsonl'}, the first one is {first_bad(out)}")
    counted = [
        f"{count:,} conversations ({name.replace('_', ' ')})"
        for name, count in summary["conversations"].items()
        if count
    ]
    n_bins = sum(name.endswith(".bin") for name in summary["files"])
    print(f"{out}: " + ", ".join([f"{n_bins} token bins", *counted]))


if __name__ == "__main__":
    run(main, parse(Args, "data_process"))

"""Tokenize corpora into token bins, which training maps into memory.

Documents are written in the order in which they are read. The files are therefore the same, byte for byte, for any
number of processes, and also after a kill: they are written in `out/data_process.part/`, beside a checkpoint from which
the same command continues, and move to `out/` when they are complete.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from bins.filters import Filters, known_languages
from bins.outputs import Outputs, outputs_in, publish, read_checkpoint, read_summary, sums_of, write_conversations
from bins.screen import ScreenedBatch, screen
from bins.tokenize import tokenize
from cli.args import parse, run
from cli.extras import need
from cli.progress import Progress, track
from cli.record import record_run, to_plain
from corpora import BadRecord, DamagedFile, Document, SourceArgs, read, read_conversations, text_size
from corpora.files import find_files
from files import alone_in, write_sealed, written_aside
from tokenizer import Tokenizer, check_saving, load_tokenizer

CHECKPOINT_SECONDS = 10.0
TABLE_ROWS = 20
COUNTS = ("documents", "held_out", "tokens", "held_out_tokens", "characters", "bytes", "too_short", "duplicate", "bad")
FILTERED = ("too_long", "other_language", "near_duplicate")  # counted where the run filters
NAMED = 5


@dataclass(frozen=True)
class Args(SourceArgs):
    """Tokenize corpora: documents into out/train_*.bin and out/heldout.bin, conversations into out/sft_*.jsonl."""

    tokenizer: Path = Path("data/tiny/tokenizer")
    """Tokenizer: a directory, a SentencePiece .model or a tokenizer.json."""
    out: Path = Path("data/tiny")
    """Directory to write the bins to."""
    processes: Annotated[int, (1, 4096)] = os.cpu_count() or 1
    """Number of tokenizing processes; 1 uses the main process only. The output does not depend on it."""
    tokens_per_file: Annotated[int, (1, 4611686018427387904)] = 100_000_000
    """Maximum number of tokens in a training bin. A document lies in one bin, so a longer one makes a larger bin."""
    held_out: float = 0.01
    """Share of documents that are not trained on, chosen by the hash of their text. A corpus with a split keeps it."""
    min_chars: int = 10
    """Drop documents with fewer characters, not counting white space at both ends. Empty ones are always dropped."""
    max_chars: int = 0
    """Drop documents with more characters; 0: none. Documents of your own files are cut by --part_chars before."""
    languages: tuple[str, ...] = ()
    """Keep documents in these languages only, such as zh en (ISO 639-1, judged by their first 1000 characters)."""
    deduplicate: bool = True
    """Drop exact duplicates. Needs 16 MB of memory per million documents, and briefly 32 MB."""
    near_duplicates: float = 0.0
    """Drop documents that are nearly as one before: that share such a part of their 8 characters in a row, for example
    0.8, by MinHash; 0: keep them. Needs some 200 MB of memory per million documents."""
    save_all_text: bool = False
    """Also write the training documents to out/all_text.txt, separated by blank lines, to train a tokenizer on."""
    overwrite: bool = False
    """Replace files in --out that were made with other inputs or arguments."""


def main(args: Args) -> dict[str, Any]:
    """Write the bins and the tokenizer beside them; returns the content of `out/summary.json`.

    It has counts per source, files and their sizes.
    """
    check_arguments(args)
    tokenizer = load_tokenizer(args.tokenizer)
    check_copy(args, tokenizer)
    if tokenizer.eos_id is None:
        raise ValueError(f"--tokenizer {args.tokenizer} has no end-of-text token, which ends every document in a bin")
    check_saving(tokenizer)
    items = read(args)
    with alone_in(args.out):
        summary = write_outputs(args, items, tokenizer)
        copy_tokenizer(args, tokenizer)
    return summary


def write_outputs(args: Args, items: Iterable[Document | BadRecord], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write all files that an earlier run has not written yet; returns the summary."""
    inputs = input_files(args)
    made_from = describe_run(args, tokenizer, inputs)
    work = args.out / "data_process.part"
    progress = read_checkpoint(work, made_from, args.overwrite)
    if progress is None:
        summary = read_summary(args.out, made_from, args.overwrite)
        if summary:
            print(f"{args.out} already holds the result of these inputs and arguments: nothing to do")
            return summary
        progress = {"made_from": made_from, "items": 0, "sources": {}, "outputs": {}}
    if "summary" not in progress:
        try:
            progress["summary"] = process(args, items, tokenizer, work, progress)
            write_sealed(work / "progress.json", progress)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    f"{work}: the disk is full ({error}); free some space, then repeat the command to continue"
                ) from error
            raise
        finally:
            if not (work / "progress.json").exists():  # no checkpoint: a later run could not continue from these files
                shutil.rmtree(work, ignore_errors=True)
    record_run(args.out, "data_process", args, inputs)
    publish(work, args.out, progress["summary"])
    print_table(progress["summary"], args.out)
    return progress["summary"]


def check_arguments(args: Args) -> None:
    """Raise ValueError for arguments out of range, before any work."""
    for name, minimum in (("processes", 1), ("tokens_per_file", 1), ("min_chars", 0), ("max_chars", 0)):
        if getattr(args, name) < minimum:
            raise ValueError(f"--{name} should be at least {minimum}, found {getattr(args, name)}")
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held_out should be a share of at least 0 and below 1, found {args.held_out}")
    if not 0 <= args.near_duplicates <= 1:
        raise ValueError(f"--near_duplicates should be a share from 0 to 1, found {args.near_duplicates}")
    if args.near_duplicates:
        need("--near_duplicates", "data", "rensa")
    if args.languages:
        need("--languages", "data", "py3langid")
        if unknown := [name for name in args.languages if name not in known_languages()]:
            raise ValueError(f"--languages: unknown {', '.join(unknown)}; known are {' '.join(known_languages())}")
    for path in args.input:
        if args.out.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"--out {args.out} lies inside --input {path}, so the next run would read it; choose another --out"
            )


def check_copy(args: Args, tokenizer: Tokenizer) -> None:
    """Raise ValueError when out/tokenizer, where training looks for the tokenizer of the bins, is another one."""
    beside = args.out / "tokenizer"
    if beside.exists() and not args.overwrite and load_tokenizer(beside).sha256() != tokenizer.sha256():
        raise ValueError(
            f"{beside} is another tokenizer than --tokenizer {args.tokenizer}; choose another --out, or replace it: "
            "--overwrite true"
        )


def copy_tokenizer(args: Args, tokenizer: Tokenizer) -> None:
    """Write the tokenizer to out/tokenizer, unless it is there: pretraining and evaluation look for it there."""
    beside = args.out / "tokenizer"
    if not beside.exists() or load_tokenizer(beside).sha256() != tokenizer.sha256():
        with written_aside(beside) as aside:
            tokenizer.save(aside)


def process(
    args: Args, items: Iterable[Document | BadRecord], tokenizer: Tokenizer, work: Path, progress: dict[str, Any]
) -> dict[str, Any]:
    """Write every file in `work`, from the checkpoint `progress` to the end of `items`; returns the summary.

    Raises ValueError when nothing is left to train on.
    """
    counts = {name: Counter(numbers) for name, numbers in progress["sources"].items()}
    screening = {name: getattr(args, name) for name in ("min_chars", "max_chars", "held_out", "deduplicate")}
    batches = skip_written(screen(items, **screening), progress["items"], args.near_duplicates > 0)
    filters = Filters(args.languages, args.near_duplicates)
    outputs = Outputs(work, tokenizer, args.tokens_per_file, args.save_all_text, progress["outputs"])
    done = sum(numbers["bytes"] for numbers in counts.values())
    bar = Progress("tokenizing", "B", text_size(args), done)
    damaged = progress.setdefault("damaged", [])
    saved_at, saved_shard = time.monotonic(), outputs.shard
    for batch, documents in tokenize(batches, tokenizer, args.processes, filters):
        for document, ids in zip(batch.documents, documents):
            n_bytes = outputs.add(document, ids)
            numbers = {"documents": 1, "held_out": int(document.held_out), "tokens": len(ids), "bytes": n_bytes}
            numbers["held_out_tokens"] = len(ids) if document.held_out else 0
            batch.count(document.source, **numbers, characters=len(document.text))
        for record in batch.bad:
            outputs.add_bad(record)
            batch.count(source_of(record, args), bad=1)
            if isinstance(record, DamagedFile):
                damaged.append(f"{record.where}: {record.reason}")
        for name, numbers in batch.counts.items():
            counts.setdefault(name, Counter()).update(numbers)
        bar.add(sum(numbers["bytes"] for numbers in batch.counts.values()))
        if outputs.shard != saved_shard or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            progress |= {"items": batch.end, "sources": counts, "outputs": outputs.state()}
            write_sealed(work / "progress.json", progress)
            saved_at, saved_shard = time.monotonic(), outputs.shard
    bar.close()
    outputs.close()
    conversations = write_conversations(track(read_conversations(args), "writing", "conversations"), work)
    if examples := examples_of(args):
        (work / "examples.txt").write_text("".join(f"{example}\n" for example in examples), encoding="utf8")
    written = sums_of(path for path in outputs_in(work) if path.name not in outputs.finished)
    progress["outputs"] = {"finished": outputs.finished | written}
    summary = summarize(counts, conversations, progress["made_from"], work) | {"damaged_files": damaged}
    if not any(name.startswith(("train_", "sft_train")) for name in summary["files"]):
        reasons = why_nothing(summary["total"], work)
        shutil.rmtree(work)
        raise ValueError(f"no text to train on ({reasons}); {args.out} is unchanged")
    return summary


def skip_written(batches: Iterable[ScreenedBatch], done: int, compare: bool = False) -> Iterator[ScreenedBatch]:
    """Yield the batches after the first `done` items, which an interrupted run has already written.

    The first batches are read again only to know what was there: the set of digests that finds duplicates, and, with
    `compare`, what finds near-duplicates, for which they come marked as written.
    """
    bar = Progress("reading finished records again", "records", done, active=done > 0)
    for batch in batches:
        if batch.end > done:
            bar.close()
            yield batch
        else:
            bar.add(batch.end - bar.done)
            if compare:
                batch.written = True
                yield batch


def source_of(record: BadRecord, source: SourceArgs) -> str:
    """Return the name under which a bad record is counted: that of the documents of the same file or folder."""
    names = (path.name for path in input_paths(source) if record.where.startswith(str(path)))
    return next(names, record.where.rpartition(":")[0] or record.where)


def input_paths(source: SourceArgs) -> list[Path]:
    """Return the files and folders of the user: --input, --loader, and the folders of corpora that users download."""
    folders = [source.raw_dir / corpus.name for corpus in source.corpora()]
    loader = [source.loader] if source.loader else []
    return [*source.input, *loader, *(folder for folder in folders if folder.is_dir())]


def input_files(source: SourceArgs) -> list[Path]:
    """Return all files of `input_paths`."""
    return [file for path in input_paths(source) for file in ([path] if path == source.loader else find_files(path))]


def examples_of(source: SourceArgs) -> list[str]:
    """Return what the named corpora suggest to ask a model that is trained on their conversations."""
    return [example for corpus in source.corpora() for example in corpus.examples]


def describe_run(args: Args, tokenizer: Tokenizer, inputs: list[Path]) -> dict[str, Any]:
    """Return all that determines the bytes of the bins, as values that JSON can hold.

    Two runs with equal descriptions write the same files.
    """
    plain = to_plain(args)
    for name in ("tokenizer", "out", "processes", "overwrite"):
        del plain[name]
    for name in ("max_chars", "languages", "near_duplicates"):  # bins of before had none of them
        if not plain[name]:
            del plain[name]
    if not inputs:  # they are about the user's own files; bins of before that had neither are the same
        del plain["format"], plain["part_chars"]
    stats = {str(path): path.stat() for path in inputs}
    plain["inputs"] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    begins = {"bos": tokenizer.begins} if tokenizer.begins else {}
    examples = {"examples": examples_of(args)} if examples_of(args) else {}  # conversations of before had none
    return plain | {"tokenizer_sha256": tokenizer.sha256()} | begins | examples


def summarize(
    counts: dict[str, Counter], conversations: dict[str, int], made_from: dict[str, Any], work: Path
) -> dict[str, Any]:
    """Return the summary: counts per source and in total, and the files with their sizes."""
    total: Counter = Counter()
    for numbers in counts.values():
        total.update(numbers)
    return {
        "sources": {name: with_ratio(numbers) for name, numbers in counts.items()},
        "total": with_ratio(total),
        "conversations": conversations,
        "files": {path.name: path.stat().st_size for path in outputs_in(work)},
        "made_from": made_from,
    }


def with_ratio(numbers: Counter) -> dict[str, Any]:
    """Return the COUNTS of a source with its characters per token, None for a source without tokens."""
    ratio = round(numbers["characters"] / numbers["tokens"], 3) if numbers["tokens"] else None
    filtered = {name: numbers[name] for name in FILTERED if numbers[name]}
    return {name: numbers[name] for name in COUNTS} | filtered | {"characters_per_token": ratio}


def why_nothing(total: dict[str, Any], work: Path) -> str:
    """Return, in words, why no document is left to train on, with the first bad record."""
    reasons = {key: total[key] for key in ("held_out", "too_short", "duplicate", *FILTERED, "bad") if total.get(key)}
    words = [f"{count} {key.replace('_', ' ')}" for key, count in reasons.items()] or ["no documents at all"]
    if total["bad"]:
        words[-1] += f", the first at {first_bad(work)}"
    return ", ".join(words)


def first_bad(folder: Path) -> str:
    """Return the place and reason of the first record in bad_records.jsonl."""
    with (folder / "bad_records.jsonl").open(encoding="utf8") as file:
        first = json.loads(file.readline())
    return f"{first['where']}: {first['reason']}"


def print_table(summary: dict[str, Any], out: Path) -> None:
    """Print the counts of each source, largest first."""
    filtered = [name for name in FILTERED if name in summary["total"]]
    keys = ["documents", "held_out", "tokens", "held_out_tokens", "characters_per_token", "too_short", "duplicate"]
    keys += [*filtered, "bad"]
    heads = ["documents", "held out", "tokens", "held-out tokens", "chars/token", "too short", "duplicate"]
    heads += [*(name.replace("_", " ") for name in filtered), "bad"]
    rows = sorted(summary["sources"].items(), key=lambda row: -row[1]["tokens"])
    table = [*rows[:TABLE_ROWS], ("all", summary["total"])]
    width = max(len(name) for name, _ in table)
    print("  ".join([" " * width, *(f"{head:>{max(len(head), 11)}}" for head in heads)]))
    for name, numbers in table:
        values = ("-" if numbers.get(key, 0) is None else f"{numbers.get(key, 0):,}" for key in keys)
        print(
            "  ".join([f"{name:<{width}}", *(f"{value:>{max(len(head), 11)}}" for value, head in zip(values, heads))])
        )
    if len(rows) > TABLE_ROWS:
        print(f"({out / 'summary.json'} lists {len(rows) - TABLE_ROWS} smaller sources)")
    for warning in warnings_of(summary):
        print(f"warning: {warning}")
    if summary["total"]["bad"]:
        print(f"bad records are in {out / 'bad_records.jsonl'}; the first one: {first_bad(out)}")
    conversations = [
        f"{count:,} conversations ({name.replace('_', ' ')})"
        for name, count in summary["conversations"].items()
        if count
    ]
    n_bins = sum(name.endswith(".bin") for name in summary["files"])
    print(f"{out}: " + ", ".join([f"{n_bins} token bins", *conversations]))


def warnings_of(summary: dict[str, Any]) -> list[str]:
    """Return sentences about damaged files, and about documents of which none is held out although some should be."""
    found, damaged = [], summary.get("damaged_files", [])  # summaries of older versions have no such entry
    if damaged:
        more = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        found.append(f"damaged files, of which only a part or nothing was read: {'; '.join(damaged[:NAMED])}{more}")
    sources = {name: numbers["documents"] for name, numbers in summary["sources"].items() if not numbers["held_out"]}
    sources = {name: documents for name, documents in sources.items() if documents}
    if sources and summary["made_from"]["held_out"]:
        names = ", ".join(f"{name} ({n:,} document{'s' * (n != 1)})" for name, n in [*sources.items()][:NAMED])
        enough = math.ceil(100 * (1 - 0.02 ** (1 / min(sources.values())))) / 100
        # documents are chosen by their hash: of n, this share leaves none out in one case of fifty
        more = f"raise --held_out ({enough} almost always holds some out)" if enough <= 0.5 else "give more texts"
        found.append(
            f"nothing is held out of {names}, so no loss tells how training does on it: {more}, or lower --part_chars, "
            "which cuts long documents into more parts"
        )
    return found


if __name__ == "__main__":
    run(main, parse(Args, "data_process"), less_memory="a smaller --processes takes less")

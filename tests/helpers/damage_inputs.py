"""Damaged and odd texts and records of the user: the damage costs itself, is named and counted."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.damage_runs import Kind, Result, World
from helpers.forked import Child, Ended

FORMATS = ("txt", "jsonl", "json", "csv", "tsv", "parquet")
PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
N = 60  # documents of a file
WORDS = ("月", "the", "river", "山中", "1984", "é", "🌙", "a, b", "c'd", "x")
MB = 1 << 20


def texts(rng: random.Random) -> list[str]:
    """Return N different texts without line ends."""
    return [f"{number}: " + " ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for number in range(N)]


def written(kind: str, values: list[str]) -> list[bytes]:
    """Return a file of texts as the bytes of its header, of each text, and of its end."""
    if kind == "json":
        parts = [json.dumps({"text": text}, ensure_ascii=False) for text in values]
        parts = ["[", *(part + "," for part in parts[:-1]), parts[-1], "]"]
    elif kind in ("csv", "tsv"):
        parts = []
        for row in [["text", "n"], *([text, n] for n, text in enumerate(values))]:
            out = io.StringIO()
            csv.writer(out, delimiter=",\t"[kind == "tsv"]).writerow(row) if kind == "csv" else out.write(
                "\t".join(map(str, row)) + "\n"
            )
            parts.append(out.getvalue())
        parts.append("")
    else:
        parts = ["", *(text + "\n" if kind == "txt" else json.dumps({"text": text}) + "\n" for text in values), ""]
    return [part.encode() for part in parts]


def parquet(path: Path, columns: dict[str, list], rows: int, checked: bool = True) -> None:
    """Write a parquet file with groups of `rows` rows, with the checksums of its pages if `checked`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=rows, write_page_checksum=checked, compression="snappy")


def pack(data: bytes, packing: str) -> bytes:
    """Return compressed bytes; zst with its checksum, as its command line writes it."""
    if packing == "zst":
        import zstandard

        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return PACKED[packing](data)


def read_in_child(world: World, path: Path) -> tuple[Ended, list[str], list[list[str]]]:
    """Read a file or folder as data_process.py does, in a process of its own; return what it gave."""
    answer = world.folder / "read.json"
    answer.unlink(missing_ok=True)

    def read() -> None:
        from corpora.files import read_files
        from corpora.registry import BadRecord

        items = list(read_files(path, "text"))
        bad = [[item.where, item.reason] for item in items if isinstance(item, BadRecord)]
        answer.write_text(json.dumps([[item.text for item in items if not isinstance(item, BadRecord)], bad]))

    ended = Child(read, world.folder / "said.txt").finish()
    return ended, *(json.loads(answer.read_text()) if answer.is_file() else ([], []))


def damaged(kind: str, packing: str) -> Callable[[World, random.Random], Result]:
    """Return a trial of a damaged file of this format in a folder with a whole one behind it."""

    def trial(world: World, rng: random.Random) -> Result:
        folder, values = world.fresh(), texts(rng)
        path = folder / ".".join(filter(None, ["a", kind, packing]))
        beside = [f"whole {number}" for number in range(5)]
        (folder / "z.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in beside))
        parts = written(kind, values)
        if kind == "parquet":
            parquet(path, {"text": values, "n": list(range(N))}, 20)
            data = bytearray(path.read_bytes())
        else:
            data = bytearray(pack(b"".join(parts), packing))
        how, at = rng.choice(["a flipped bit", "zeros", "cut off", "other bytes"]), rng.randrange(len(data))
        end = at + 1 if how == "a flipped bit" else min(len(data), at + rng.randint(1, 64))
        if how == "cut off":
            data, end = data[:at], len(data)
        elif how == "a flipped bit":
            data[at] ^= 1 << rng.randrange(8)
        else:
            data[at:end] = bytes(end - at) if how == "zeros" else rng.randbytes(end - at)
        path.write_bytes(data)
        ended, found, bad = read_in_child(world, folder)
        what = f"{path.name}, {how} at {at}"
        if ended.traceback or ended.status:
            return Result("traceback", f"{what}: {ended.said[-800:]}")
        if found[-5:] != beside:
            return Result("lost", f"{what}: the whole file behind it gave {found[-5:]}")
        named = any(place.startswith(str(path)) for place, _ in bad)
        checked = bool(packing) or kind == "parquet"
        touched = [] if checked else touched_by(parts, at, end)
        return compare(values, found[:-5], touched, named, checked, what)

    return trial


def touched_by(parts: list[bytes], at: int, end: int) -> list[int]:
    """Return the numbers of the texts of which bytes from `at` to `end` are a part, or whose line end they touch."""
    begins, numbers = 0, []
    for number, part in enumerate(parts):
        if begins < end + 1 and begins + len(part) > at - 1:
            numbers.append(number - 1)
        begins += len(part)
    return numbers


def compare(values: list[str], found: list[str], touched: list[int], named: bool, checked: bool, what: str) -> Result:
    """Return the result: texts beside the damage are there in their order; damage that can be seen is named.

    checked: the file has checksums, so that any difference is to be named.
    """
    if found == values:
        return Result("held", f"{what}: nothing is lost")
    missing = [n for n, text in enumerate(values) if text not in found]
    if checked:
        return Result("held" if named else "silent", f"{what}: {len(missing)} of {N} texts lost, named: {named}")
    beside = [n for n in missing if n not in touched and n - 1 not in touched and n + 1 not in touched]
    order = [values.index(text) for text in found if text in values]
    if beside or order != sorted(order):
        return Result("lost" if named else "silent", f"{what}: texts {beside[:5]} beside the damage {touched} are lost")
    return Result("held", f"{what}: {len(missing)} texts, named: {named}")


# ---- records of conversations


def odd(rng: random.Random, depth: int = 0) -> Any:
    """Return any JSON value, half surrogate pairs, huge numbers and deep nesting among them."""
    plain = [None, True, -1, 10**30, 1e308, float("nan"), "", "\ud800", "\x00", "月", " ", "<|im_end|>", [], {}]
    if depth > 3 or rng.random() < 0.5:
        return rng.choice(plain)
    if rng.random() < 0.05:
        value: Any = "deep"
        for _ in range(rng.choice([50, 900])):
            value = [value]
        return value
    if rng.random() < 0.4:
        return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ("role", "content", "from", "value", "messages", "conversations", "question", "answer", "prompt", "\ud800")
    keys += ("response", "instruction", "output", "input", "system", "history", "tools", "tool_calls", "text", "loss")
    return {rng.choice(keys): odd(rng, depth + 1) for _ in range(rng.randrange(5))}


def records(world: World, rng: random.Random) -> Result:
    """Read odd records among good ones as fine_tuning.py --show does: each good one is counted, each odd one named."""
    folder = world.fresh()
    good = [{"question": f"{n}?", "answer": f"the moon {n}"} for n in range(4)]
    values = [*good, *(odd(rng) for _ in range(12))]
    rng.shuffle(values)
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    ended = Child(lambda: read_records(path, folder), world.folder / "said.txt").finish()
    if ended.traceback or ended.status:
        return Result("traceback", f"{ended.said[-1200:]} {json.dumps(values)[:300]}")
    read, bad = json.loads((folder / "answer.json").read_text())
    texts = [message["content"] for messages in read for message in messages]
    if any(record["answer"] not in texts for record in good):
        return Result("lost", f"a good record is gone: {json.dumps(values)[:500]}")
    if len(read) + bad != len(values):
        return Result("silent", f"{len(values)} records, {len(read)} conversations and {bad} bad ones")
    return Result("held", f"{bad} bad")


def read_records(path: Path, folder: Path) -> None:
    """Read conversations, write the bad records aside and how many there are to answer.json."""
    from chat.conversations import file_conversations
    from corpora.registry import BadRecord
    from tuning.data import keep_aside

    bad: list[BadRecord] = []
    read = list(file_conversations(path, bad))
    keep_aside({path: bad}, folder)
    aside = folder / "broken_chats.jsonl"
    if bad and len([json.loads(line) for line in aside.read_bytes().splitlines()]) != len(bad):
        raise SystemExit("not all bad records are aside")
    (folder / "answer.json").write_text(json.dumps([read, len(bad)]))


# ---- memory


def memory(kind: str, size: int, most: float) -> Callable[[World, random.Random], Result]:
    """Return a trial that reads a file with something huge in it, `size` bytes; it may take `most` times as much."""

    def trial(world: World, rng: random.Random) -> Result:
        folder = world.fresh()
        path = folder / ("big." + kind.split()[0])
        text = "moon river " * 10
        if kind.startswith("parquet"):
            n = 1 if "cell" in kind else size // len(text)
            big = [text * (size // len(text))] if "cell" in kind else [f"{i} {text}" for i in range(n)]
            Child(lambda: parquet(path, {"text": big}, n), world.folder / "said.txt").finish()
        else:
            line = text * (size // len(text))
            whole = {"txt": line, "jsonl": json.dumps({"text": line}), "csv": f'text\n"{line}"\n'}
            path.write_text(whole.get(kind.split()[0], f'[{{"text": "{line}"}}]'))
        command = f"data_process --input {path} --tokenizer {tokenizer_json(world)} --out {folder}/out --processes 1"
        nothing = Child(lambda: None, world.folder / "said.txt").finish().peak
        ended = world.run(command + " --held_out 0 --min_chars 1")
        if ended.traceback:
            return Result("traceback", f"{kind}: {ended.said[-800:]}")
        more = ended.peak - nothing
        note = f"{kind}, {size / MB:.0f} MB: {more / MB:.0f} MB more ({more / size:.1f} times)"
        return Result("held" if more < most * size + 100 * MB else "lost", note)

    return trial


def tokenizer_json(world: World) -> Path:
    """Return a directory with a tokenizer.json only."""
    from helpers.vocabularies import write_byte_level

    return world.once("tokenizer.json", lambda: write_byte_level(world.folder / "byte_level"))


def inputs() -> dict[str, Kind]:
    """Return the kinds of trials of this file by name."""
    found: dict[str, Kind] = {}
    for kind in FORMATS:
        for packing in ("", "gz", "zst", "bz2", "xz") if kind != "parquet" else ("",):
            name = ".".join(filter(None, [kind, packing]))
            checked = " (it has checksums: any damage is named)" if packing or kind == "parquet" else ""
            promise = f"A damaged {kind} file{', compressed,' if packing else ''} costs itself only{checked}"
            found[f"input: {name}"] = Kind(promise, 40 if packing else 80, damaged(kind, packing))
    promise = "Odd records among conversations: each good one is used, each odd one named"
    found["records"] = Kind(promise, 600, records)
    promise = "Memory while data_process.py reads: at most {} times the size of {}, and 100 MB"
    for kind, most in (("parquet, one group", 2), ("parquet, one cell", 6), ("txt line", 8), ("jsonl line", 8)):
        words = {"parquet, one group": "a group of rows", "parquet, one cell": "a cell"}.get(kind, "a line")
        found[f"memory: {kind}"] = Kind(promise.format(most, words), 2, memory(kind.replace(",", ""), 24 * MB, most))
    for kind in ("csv line", "json line"):
        found[f"memory: {kind}"] = Kind(promise.format(8, "a line"), 2, memory(kind, 24 * MB, 8))
    return found

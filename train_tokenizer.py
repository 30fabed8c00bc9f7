"""Train a SentencePiece BPE tokenizer: `python train_tokenizer.py --help`."""

from __future__ import annotations

import io
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

import corpora
from bins.screen import screen
from chat.template import TEMPLATES, read_template
from cli.args import parse, run
from cli.progress import Progress
from cli.record import record_run
from files import alone_in, read_json, written_aside
from tokenizer import MARKERS, SPACE, SentencePieceTokenizer, Tokenizer, load_tokenizer

PAD = "<pad>"
RESERVED = 4 + len(MARKERS) + 256  # <unk>, <s>, </s>, <pad>, our chat markers, the bytes
MAX_LINE = 4000  # characters; longer lines are cut, because SentencePiece drops those over max_sentence_length bytes
OUTPUTS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "report.json", "config.yaml", "run.json")

# Texts of four kinds on which the report measures a tokenizer, beside the held-out text of the corpus.
SAMPLES = {
    "Chinese": (
        "清晨的集市已经热闹起来。卖豆腐的老人把木板一块块卸下，热气从棉布底下冒出来；隔壁的姑娘正在称新摘的黄瓜，顺手多添了一根。"
        "“今天的雨下得好，”老人说，“再过半个月，山上的茶就可以采了。”公共汽车在路口停了三分钟，下来几个背着书包的学生，"
        "他们一边走一边讨论昨天晚上的足球比赛，谁也没有注意到屋檐下那只打瞌睡的猫。"
    ),
    "English": (
        "The ferry left a little after seven, when the fog had lifted from the far side of the bay. Most of the "
        "passengers stood at the rail with their hands around paper cups, watching the gulls argue over something in "
        'the water. "You will want the second stop," the mate told us, "not the first; nobody lives there any more." '
        "We thanked him, found a dry bench, and unfolded the map that my sister had drawn from memory."
    ),
    "digits": "2024-03-17 08:45, 1729 = 1^3 + 12^3, 3.14159265, 1,000,000.00, +86 010 5550 0199, 0x7f3a, 73.5%, 40:27",
    "code": (
        "def moving_average(values, window=3):\n"
        '    """Mean of each run of `window` neighbours."""\n'
        "    if window < 1:\n"
        '        raise ValueError(f"window must be positive, found {window}")\n'
        "    total = sum(values[:window])\n"
        "    averages = [total / window]\n"
        "    for old, new in zip(values, values[window:]):\n"
        "        total += new - old\n"
        "        averages.append(total / window)\n"
        "    return averages\n"
    ),
}


@dataclass(frozen=True)
class Args(corpora.SourceArgs):
    """Train a SentencePiece BPE tokenizer on a corpus, or add the pieces of a corpus to another vocabulary (--merge).

    Texts are not normalised and get no space in front. Characters outside the vocabulary are written as bytes, each
    digit is a token of its own, and no piece contains the end of a line. Held-out documents are not trained on.
    """

    out: Path = Path("data/tiny/tokenizer")
    """Directory to write: tokenizer.model, the same tokenizer for transformers, report.json."""
    vocab_size: int = 4800
    """Number of ids; 264 of them are special tokens and bytes. With --max_piece_length 1 the largest number."""
    character_coverage: float | None = None
    """Share of the text whose characters get ids, 0.98 to 1. None: at most 7/8 of the ids are characters, 1/8 words;
    with --max_piece_length 1 all of them are characters."""
    max_piece_length: int = 16
    """Maximum length of a piece in characters; 1 makes a character tokenizer."""
    sample_bytes: int = 32 << 20
    """Maximum size of the training text in bytes, sampled evenly from the whole corpus. Memory grows with it."""
    held_out: float = 0.01
    """Share of documents that are not trained on, chosen by the hash of their text, as in data_process.py."""
    merge: Path | None = None
    """SentencePiece BPE .model (such as LLaMA's) to which the new pieces are added; its own ids do not change."""
    compare: tuple[Path, ...] = ()
    """Other tokenizers to compare in the report: directories, .model or tokenizer.json files."""
    overwrite: bool = False
    """Replace a tokenizer in --out that token bins beside it were made with."""
    seed: int = 0
    """Random seed for the sample of lines."""
    threads: int = 2
    """Number of SentencePiece threads; the result does not depend on it."""


def main(args: Args) -> dict[str, Any]:
    """Train a tokenizer, write it and report.json to the directory `args.out`, and return the report.

    Raises ValueError for an argument that it cannot use, a corpus without text to train on, and a vocab_size that is
    too small for the characters of the corpus or too large for its text.
    """
    check_arguments(args)
    with alone_in(args.out):
        try:
            return train(args)
        finally:
            if not any(args.out.iterdir()):  # the lock made it
                args.out.rmdir()


def train(args: Args) -> dict[str, Any]:
    """Do what `main` says, alone in the directory."""
    base = read_base(args.merge) if args.merge else None
    others = {str(path): load_tokenizer(path) for path in (args.merge, *args.compare) if path}
    sample, held_out, counts = read_sample(args)
    coverage = args.character_coverage or choose_coverage(sample.lines, args)
    seconds = expected_seconds(sample.bytes, args.vocab_size)
    size = f"{len(sample.lines):,} lines, {sample.bytes / 1e6:.1f} MB"
    print(f"training a vocabulary of {args.vocab_size} on {size}: about {seconds:.0f} s", flush=True)
    started = time.monotonic()
    model = train_model(sample.lines, coverage, args)
    print(f"trained in {time.monotonic() - started:.1f} s")
    if base is not None:
        model = merge(base, model)
    tokenizer = SentencePieceTokenizer(model)
    tokenizer.chat_template, _ = read_template(TEMPLATES / "ours.jinja")
    check_bins(args, tokenizer)
    texts = SAMPLES | ({"held-out": "\n".join(held_out.lines)} if held_out.lines else {})
    report = {
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256(),
        "character_coverage": round(coverage, 6),
        **counts,
        "lines": len(sample.lines),
        "bytes": sample.bytes,
        "characters_per_token": compare({str(args.out): tokenizer, **others}, texts),
    }
    print(table(report["characters_per_token"]))
    print(f"({', '.join(SAMPLES)}: short texts built into this program; held-out: documents of this corpus)")
    with written_aside(args.out) as aside:
        tokenizer.save(aside)
        (aside / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf8")
        record_run(aside, "train_tokenizer", args, [args.merge] if args.merge else [])
    print(f"wrote {args.out}: {tokenizer.vocab_size} ids")
    return report


def check_bins(args: Args, tokenizer: Tokenizer) -> None:
    """Raise ValueError when bins beside --out were made with the tokenizer in --out and `tokenizer` is another one."""
    if args.overwrite or not (args.out / "report.json").is_file():
        return
    old = read_json(args.out / "report.json")["sha256"]
    bins = [path for pattern in ("train_*.json", "heldout.json") for path in sorted(args.out.parent.glob(pattern))]
    made = [path for path in bins if read_json(path).get("tokenizer_sha256") == old]
    if made and tokenizer.sha256() != old:
        raise ValueError(
            f"--out {args.out} holds the tokenizer that {made[0].with_suffix('.bin')} was made with, and the new one "
            "is another; choose another --out, or replace it and make the bins again: --overwrite true"
        )


def check_arguments(args: Args) -> None:
    """Raise ValueError for arguments out of range, and for an --out that cannot be written, before any work."""
    if args.character_coverage is not None and not 0.98 <= args.character_coverage <= 1:
        raise ValueError(f"--character_coverage should be between 0.98 and 1, found {args.character_coverage}")
    for name in ("vocab_size", "max_piece_length", "sample_bytes", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} should be at least 1, found {getattr(args, name)}")
    for name, most in (("vocab_size", 2**31 - 1), ("max_piece_length", 512), ("threads", 1024)):  # SentencePiece's
        if getattr(args, name) > most:
            raise ValueError(f"--{name} should be at most {most}, found {getattr(args, name)}")
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held_out should be a share of at least 0 and below 1, found {args.held_out}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} should be a directory, found a file")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the training
    if not os.access(args.out.parent, os.W_OK):
        raise PermissionError(f"--out {args.out}: no permission to write to {args.out.parent}; choose another --out")
    if args.out.exists() and (others := {path.name for path in args.out.iterdir()} - set(OUTPUTS)):
        raise ValueError(
            f"--out {args.out} would be replaced, but holds files of something else ({', '.join(sorted(others)[:3])}); "
            "choose another --out"
        )


class Sample:
    """A random sample of the lines of a stream, in order, of at most `budget` bytes.

    Each line is kept with the same probability, `share`, which falls whenever the sample exceeds the budget.
    """

    def __init__(self, budget: int, seed: int) -> None:
        self.budget, self.bytes, self.share = budget, 0, 1.0
        self._random = random.Random(seed)
        self._kept: list[tuple[float, str]] = []

    def add(self, text: str) -> None:
        """Add each line of `text` to the sample with probability `share`."""
        for line in lines_of(text):
            draw = self._random.random()
            if draw >= self.share:
                continue
            self._kept.append((draw, line))
            self.bytes += len(line.encode())
            while self.bytes > self.budget:  # a line stays if its own draw is below the new share
                self.share *= 0.75
                self._kept = [pair for pair in self._kept if pair[0] < self.share]
                self.bytes = sum(len(line.encode()) for _, line in self._kept)

    @property
    def lines(self) -> list[str]:
        """Lines of the sample, in the order of the stream."""
        return [line for _, line in self._kept]


def lines_of(text: str) -> Iterator[str]:
    """Yield the lines of a text without line ends; lines longer than MAX_LINE come in pieces."""
    for line in text.split("\n"):
        yield from (line[i : i + MAX_LINE] for i in range(0, len(line), MAX_LINE))


def read_sample(args: Args) -> tuple[Sample, Sample, dict[str, int]]:
    """Return a sample of lines to train on, one of held-out lines for the report, and the counts of documents.

    Raises ValueError when there is no text to train on.
    """
    train, held_out = Sample(args.sample_bytes, args.seed), Sample(1 << 18, args.seed)
    counts, first_bad = {"documents": 0, "held_out_documents": 0, "bad_records": 0}, ""
    batches = screen(corpora.read(args), min_chars=1, held_out=args.held_out, deduplicate=False)
    with Progress("reading", "B", corpora.text_size(args)) as bar:
        for batch in batches:
            counts["bad_records"] += len(batch.bad)
            for record in batch.bad[:1]:
                first_bad = first_bad or f"the first one {record.where}: {record.reason}"
            for document in batch.documents:
                counts["held_out_documents" if document.held_out else "documents"] += 1
                (held_out if document.held_out else train).add(document.text)
                bar.add(len(document.text.encode()))
    if not train.lines:
        numbers = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in counts.items())
        raise ValueError(f"no text to train on: {', '.join(filter(None, (numbers, first_bad)))}")
    if first_bad:
        print(f"bad records, left out: {counts['bad_records']:,}; {first_bad}")
    return train, held_out, counts


def choose_coverage(lines: list[str], args: Args) -> float:
    """Return the share of the text that the commonest characters cover if they fill 7/8 of the vocabulary, or all of
    one of characters alone.

    Limited to 0.98 ... 0.9995.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    room = max(args.vocab_size - RESERVED, 0)
    room = max(room - 1, 0) if args.max_piece_length == 1 else room * 7 // 8  # the one is the space
    share = sum(n for _, n in counts.most_common(room)) / counts.total()
    return min(max(share, 0.98), 0.9995)


def expected_seconds(n_bytes: int, vocab_size: int) -> float:
    """Return roughly how many seconds SentencePiece trains; the formula fits measurements with 5 to 30 MB of text."""
    return 1 + n_bytes / 1e6 * (0.06 + vocab_size / 36_000)


def train_model(lines: list[str], coverage: float, args: Args) -> bytes:
    """Train a SentencePiece model on `lines` and return its bytes; the same lines and settings give the same bytes.

    Raises ValueError when the vocabulary is too small or too large for the lines.
    """
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type="bpe",
            vocab_size=args.vocab_size,
            character_coverage=coverage,
            max_sentencepiece_length=args.max_piece_length,
            num_threads=args.threads,
            pad_id=3,
            control_symbols=list(MARKERS),
            byte_fallback=True,
            hard_vocab_limit=args.max_piece_length > 1,  # characters may be fewer than the limit
            required_chars=SPACE,  # otherwise a corpus without spaces gives no id to the space
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=5 * MAX_LINE,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise explain_error(str(error), coverage, args.vocab_size) from None
    proto = ModelProto.FromString(out.getvalue())
    proto.trainer_spec.ClearField("num_threads")  # the bytes should not depend on --threads
    return proto.SerializeToString(deterministic=True)


def explain_error(error: str, coverage: float, vocab_size: int) -> Exception:
    """Return SentencePiece's error about the size of a vocabulary as one sentence with a size that works."""
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        lower = ", or lower --character_coverage" if coverage > 0.98 else ""
        return ValueError(
            f"--vocab_size {vocab_size} is too small: the characters that cover {coverage:.2%} of this corpus need "
            f"at least {match[1]} ids; raise --vocab_size{lower}"
        )
    if match := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", error):
        return ValueError(f"--vocab_size {vocab_size} is too large for this corpus: set it to at most {match[1]}")
    return RuntimeError(error)


def read_base(path: Path) -> bytes:
    """Return the bytes of a SentencePiece BPE model.

    Raises FileNotFoundError, and ValueError for other files and types; only in BPE models scores order the merges.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--merge {path}: no such file; expected a SentencePiece .model file")
    model = path.read_bytes()
    SentencePieceTokenizer(model, path)  # raises ValueError for a file that is no model
    if ModelProto.FromString(model).trainer_spec.model_type != TrainerSpec.BPE:
        raise ValueError(f"--merge {path}: expected a SentencePiece BPE model, found another type")
    return model


def merge(base: bytes, new: bytes) -> bytes:
    """Return the model `base` with a pad token, the chat markers and the pieces of `new` added after its own ids.

    The new pieces have lower scores than all pieces of `base`, in the order of `new`. A text is therefore first joined
    as `base` joins it, and then further.
    """
    proto = ModelProto.FromString(base)
    known = {p.piece for p in proto.pieces}
    control = [] if any(p.piece == PAD for p in proto.pieces) else [PAD]
    for piece in [*control, *(marker for marker in MARKERS if marker not in known)]:
        proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.CONTROL)
    # LLaMA's runs of spaces have the score -1e9, where float32 cannot represent a difference of 1: they stay the last.
    lowest = min(p.score for p in proto.pieces if p.type == p.NORMAL and p.score > -(2**23))
    added = [p.piece for p in ModelProto.FromString(new).pieces if p.type == p.NORMAL and p.piece not in known]
    for n, piece in enumerate(added, start=1):
        proto.pieces.add(piece=piece, score=lowest - n, type=proto.SentencePiece.NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString(deterministic=True)


def compare(tokenizers: dict[str, Tokenizer], texts: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return the characters per token of every text in every tokenizer; a higher number means fewer tokens."""
    return {
        name: {kind: round(len(text) / len(tokenizer.encode(text)), 3) for kind, text in texts.items()}
        for name, tokenizer in tokenizers.items()
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the report as a table in text."""
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in [*rows, "characters per token"])
    head = "characters per token".ljust(width) + "".join(f"{column:>10}" for column in columns)
    lines = [name.ljust(width) + "".join(f"{value:10.3f}" for value in row.values()) for name, row in rows.items()]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    run(main, parse(Args, "train_tokenizer"))

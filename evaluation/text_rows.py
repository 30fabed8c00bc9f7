"""Rows of ids from any text: token bins, text files or folders, conversations as a model's template writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bins.token_bin import TokenBin
from chat.samples import read_samples
from chat.template import load_template
from cli.progress import say
from corpora.files import read_files, records
from corpora.registry import BadRecord, Document
from tokenizer import Tokenizer

ENOUGH = 50  # times as many tokens of a text are made as are drawn, so that the rows come from all over it
MOST_DOCUMENTS = 20_000  # of a text, that are kept for the draw; it may be larger than the memory


def draw_rows(paths: Sequence[Path], tokenizer: Tokenizer, length: int, n_tokens: int, seed: int) -> torch.Tensor:
    """Return rows (n, length) int64 drawn at random from all of the texts, with n_tokens tokens or a little less.

    Raises ValueError where the texts are too short for a single row, or hold ids that the tokenizer does not have.
    """
    generator = np.random.default_rng(seed)
    streams = [read_ids(path, tokenizer, ENOUGH * n_tokens, generator) for path in paths]
    counts = [len(ids) // length for ids in streams]
    ends = np.cumsum(counts)  # rows up to the end of each stream
    names = ", ".join(map(str, paths))
    if not ends[-1]:
        total = sum(map(len, streams))
        raise ValueError(f"{names}: {total} tokens are fewer than one row of {length}: give more text, or shorter rows")
    drawn = generator.choice(ends[-1], min(ends[-1], max(1, n_tokens // length)), replace=False)
    if len(drawn) * length < n_tokens // 2:
        say(f"{names}: only {len(drawn) * length:,} of the {n_tokens:,} tokens that are asked for: more text may help")
    rows = torch.empty(len(drawn), length, dtype=torch.int64)
    for row, n in zip(rows, drawn):
        stream = np.searchsorted(ends, n, side="right")
        at = (n - ends[stream] + counts[stream]) * length
        row.copy_(torch.from_numpy(streams[stream][at : at + length].astype(np.int64)))
    if int(rows.max()) >= tokenizer.vocab_size:
        raise ValueError(
            f"{names}: found the id {int(rows.max())}, expected ids below {tokenizer.vocab_size}: "
            "it was written with another tokenizer"
        )
    return rows


def read_ids(path: Path, tokenizer: Tokenizer, at_most: int, generator: np.random.Generator) -> np.ndarray:
    """Return the ids (n,) of a token bin, which is not read; of a file of conversations; or of documents drawn from a
    text, as bins have them, `at_most` in all or somewhat more."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a token bin, a text file or folder, or conversations")
    if path.suffix == ".bin":
        tokens = TokenBin(path)
        tokens.check(tokenizer.sha256(), tokenizer.vocab_size, tokenizer.begins)
        return tokens.tokens
    first = next(iter(records(path)), None) if path.is_file() else None
    value = getattr(first, "value", None)
    if isinstance(value, dict) and "text" not in value:
        broken: list[BadRecord] = []
        samples = read_samples(path, load_template(tokenizer), seq_len=1 << 20, broken=broken)
        say_broken(path, broken)
        return np.asarray(samples.ids)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids: list[int] = []
    for text in draw_texts(path, generator):
        ids += [*tokenizer.begins, *tokenizer.encode(text), *end]
        if len(ids) >= at_most:
            break
    return np.asarray(ids, np.int64)


def draw_texts(path: Path, generator: np.random.Generator) -> list[str]:
    """Return the documents of a file or folder in random order; of more than MOST_DOCUMENTS, as many at random."""
    kept: list[str] = []
    broken: list[BadRecord] = []
    for n, text in enumerate(read_texts(path, broken)):  # reservoir sampling (Vitter 1985): each has the same chance
        if len(kept) < MOST_DOCUMENTS:
            kept.append(text)
        elif (place := int(generator.integers(n + 1))) < MOST_DOCUMENTS:
            kept[place] = text
    say_broken(path, broken)
    return [kept[n] for n in generator.permutation(len(kept))]


def read_texts(path: Path, broken: list[BadRecord]) -> Iterator[str]:
    """Yield the documents of a file or folder; append what cannot be read to `broken`, without its text."""
    for document in read_files(path, "text"):
        if isinstance(document, Document):
            yield document.text
        else:
            broken.append(dataclasses.replace(document, raw=""))


def say_broken(path: Path, broken: Sequence[BadRecord]) -> None:
    """Say how many records of a text were left out because they cannot be read, and where the first one is."""
    if broken:
        first = f"the first, {broken[0].where}: {broken[0].reason}"
        say(f"{path}: records that cannot be read are left out: {len(broken):,}; {first}")

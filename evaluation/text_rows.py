"""Rows of ids from any text: token bins, text files or folders, conversations as a model's template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bins.token_bin import TokenBin
from chat.samples import read_samples
from chat.template import load_template
from cli.progress import say
from corpora.files import read_files, records
from corpora.registry import Document
from tokenizer import Tokenizer

ENOUGH = 50  # times as many tokens are read as are drawn, so that the rows come from all over a large text


def draw_rows(paths: Sequence[Path], tokenizer: Tokenizer, length: int, n_tokens: int, seed: int) -> torch.Tensor:
    """Return rows (n, length) int64 drawn at random from texts, with n_tokens tokens in all or a little less.

    Raises ValueError where the texts are too short for a single row, or hold ids that the tokenizer does not have.
    """
    streams = [read_ids(path, tokenizer, ENOUGH * n_tokens) for path in paths]
    windows = [ids[at : at + length] for ids in streams for at in range(0, len(ids) - length + 1, length)]
    names = ", ".join(map(str, paths))
    if not windows:
        total = sum(map(len, streams))
        raise ValueError(f"{names}: {total} tokens are fewer than one row of {length}: give more text, or shorter rows")
    order = np.random.default_rng(seed).permutation(len(windows))[: max(1, n_tokens // length)]
    if len(order) * length < n_tokens // 2:
        say(f"{names}: only {len(order) * length:,} of the {n_tokens:,} tokens that are asked for: more text may help")
    rows = torch.from_numpy(np.stack([windows[n] for n in order]))
    if int(rows.max()) >= tokenizer.vocab_size:
        raise ValueError(
            f"{names}: found the id {int(rows.max())}, expected ids below {tokenizer.vocab_size}: "
            "it was written with another tokenizer"
        )
    return rows


def read_ids(path: Path, tokenizer: Tokenizer, at_most: int) -> np.ndarray:
    """Return the first ids of a token bin, a file of conversations, or texts with eos behind each: (n,) int64."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a token bin, a text file or folder, or conversations")
    if path.suffix == ".bin":
        tokens = TokenBin(path)
        tokens.check(tokenizer.sha256(), tokenizer.vocab_size)
        return np.asarray(tokens.tokens[:at_most], np.int64)
    first = next(iter(records(path)), None) if path.is_file() else None
    value = getattr(first, "value", None)
    if isinstance(value, dict) and "text" not in value:
        samples = read_samples(path, load_template(tokenizer), seq_len=1 << 20)
        return np.asarray(samples.ids[:at_most], np.int64)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids: list[int] = []
    for document in read_files(path, "text"):
        if isinstance(document, Document):
            ids += [*tokenizer.begins_with, *tokenizer.encode(document.text), *end]
        if len(ids) >= at_most:
            break
    return np.asarray(ids[:at_most], np.int64)

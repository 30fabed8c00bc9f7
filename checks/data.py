"""Token bins: whether they can be read, belong to their tokenizer, and are independent of the held-out one."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from bins.token_bin import TokenBin
from checks.check import FAULT, OK, WARNING, Check, attempt, judged
from checks.vocabulary import suits
from tokenizer import Tokenizer

AGAIN = "copy the file again, or make it again with data_process.py"
MOST_READ = 20_000_000  # tokens of a bin that are compared with the held-out ones
LEAST_HELD_OUT = 10_000  # tokens; the loss of so few is known to about 0.05 nats
DOCUMENTS = 200  # decoded to see whether the tokenizer suits


def data_directory(directory: Path, tokenizer: Tokenizer) -> list[Check]:
    """Return the checks of the bins of a directory that data_process.py wrote."""
    found: list[Check] = []
    paths = sorted(directory.glob("train*.bin"))
    if not paths:
        advice = f"make them with python data_process.py --out {directory}"
        return [Check(FAULT, "token bins", "train*.bin", f"none in {directory}", advice)]
    heldout = directory / "heldout.bin"
    opened = {}
    for path in [*paths, *([heldout] if heldout.is_file() else [])]:
        found += attempt(path.name, "a whole bin of this tokenizer", AGAIN, lambda p=path: _open(p, tokenizer, opened))
    train = [opened[path] for path in paths if path in opened]
    for each in train:
        found += documents(each, tokenizer)
    if heldout in opened:
        found += held_out(train, opened[heldout])
    elif not heldout.is_file():
        advice = "make the data with data_process.py --held_out 0.01: else nothing tells whether the model memorizes"
        found.append(Check(WARNING, "held-out data", "heldout.bin", "none", advice))
    if train and (texts := [text for each in train[:1] for text in decoded(each, tokenizer)]):
        found += suits(tokenizer, texts)
    return found


def _open(path: Path, tokenizer: Tokenizer, opened: dict[Path, TokenBin]) -> Iterator[Check]:
    each = TokenBin(path)
    each.check(tokenizer.sha256(), tokenizer.vocab_size, tokenizer.begins)
    opened[path] = each
    documents = each.meta.get("documents")
    counted = f", {documents:,} documents" if documents is not None else " (headerless: its tokenizer is not known)"
    yield Check(OK, path.name, "a whole bin of this tokenizer", f"{len(each):,} tokens{counted}")


def documents(each: TokenBin, tokenizer: Tokenizer) -> list[Check]:
    """Return whether the documents of a bin end with eos, and whether one id makes up much of it."""
    part = np.asarray(each.tokens[:MOST_READ])
    checks = []
    if each.offsets is not None and len(each.offsets) > 1:
        ends = np.asarray(each.offsets[1:], dtype=np.int64) - 1
        ends = ends[ends < len(part)]
        right = float((part[ends] == each.meta["eos_id"]).mean()) if len(ends) else 1.0
        found = f"{right:.1%} of the documents".replace("%", " %")
        checks.append(judged(f"{each.path.name}: ends", "every document ends with eos", found, AGAIN, right < 1))
    if len(part):
        counts = np.bincount(part, minlength=tokenizer.vocab_size)
        top = int(counts.argmax())
        share, name = counts[top] / len(part), tokenizer.decode([top], skip_special=False)
        found = f"the most frequent, {name!r}, has {share:.0%}".replace("%", " %")
        advice = "look at the texts: padding, markup or one repeated document may have got into them"
        checks.append(
            judged(f"{each.path.name}: ids", "no id above 40 % of the tokens", found, advice, share > 0.4, WARNING)
        )
    return checks


def held_out(train: Iterable[TokenBin], heldout: TokenBin) -> list[Check]:
    """Return whether held-out documents are also trained on, and whether there are enough of them."""
    n = len(heldout)
    few = "hold out more: data_process.py --held_out 0.02, say"
    enough = f"{LEAST_HELD_OUT:,} tokens or more"
    checks = [judged("held-out tokens", enough, f"{n:,} tokens", few, n < LEAST_HELD_OUT, WARNING)]
    if heldout.offsets is None:
        return checks
    kept = set(digests(heldout))
    seen = {digest for each in train if each.offsets is not None for digest in digests(each)}
    share = len(kept & seen) / max(1, len(kept))
    found = f"{len(kept & seen):,} of {len(kept):,} held-out documents"
    advice = "make the data again with data_process.py, which removes duplicates before it holds out"
    level = FAULT if share > 0.05 else WARNING
    return [*checks, judged("held out, and trained", "no document in both", found, advice, share > 0.002, level)]


def digests(each: TokenBin) -> Iterator[bytes]:
    """Yield a digest of the ids of each document that ends within the first MOST_READ tokens of a bin."""
    offsets = np.asarray(each.offsets, dtype=np.int64)
    for begin, end in itertools.pairwise(offsets):
        if end > MOST_READ:
            return
        yield hashlib.blake2b(each.tokens[begin:end].tobytes(), digest_size=16).digest()


def decoded(each: TokenBin, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of some documents, spread over a bin."""
    if each.offsets is None or len(each.offsets) < 2:
        return []
    offsets = np.asarray(each.offsets, dtype=np.int64)
    chosen = np.unique(np.linspace(0, len(offsets) - 2, DOCUMENTS).astype(int))
    texts = (tokenizer.decode(each.tokens[offsets[i] : offsets[i + 1]].tolist()) for i in chosen)
    return [text for text in texts if text and "\ufffd" not in text]

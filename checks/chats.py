"""Conversations under a chat template: whether answers are trained, whole, and end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from chat.samples import Samples, read_samples
from chat.template import ChatTemplate, load_template
from checkpoint.locate import read_stop_ids
from checks.check import FAULT, WARNING, Check, attempt, judged
from tokenizer import Tokenizer

FORMS = "docs/finetuning.md lists the forms of records; fine_tuning.py --show 3 prints samples"


def template_of(tokenizer: Tokenizer, name: str, directory: Path | None) -> list[Check]:
    """Return whether a template ends each answer by a token, and whether the model in `directory` stops at it."""
    advice = "give an answer an end token in the template (CONTRIBUTING.md, Add a chat template)"
    return attempt(
        "template", "answers that end with a special token", advice, lambda: _template(tokenizer, name, directory)
    )


def _template(tokenizer: Tokenizer, name: str, directory: Path | None) -> Iterator[Check]:
    template = load_template(tokenizer, name)
    words = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, mask = template.encode(words)
    last = max((i for i, trained in enumerate(mask) if trained), default=-1)
    ends = last >= 0 and ids[last] in template.stop_ids
    names = ", ".join(repr(tokenizer.decode([i], skip_special=False)) for i in template.stop_ids)
    found = f"{template.name}: answers end with {names}" if ends else f"{template.name}: the end is not trained"
    advice = "let the end token stand inside {% generation %}, or take another template (--data.template)"
    yield judged("template", "a trained end of each answer", found, advice, not ends)
    stops = read_stop_ids(directory) if directory is not None else None
    if stops is not None:
        missing = [i for i in template.stop_ids if i not in stops]
        found = f"the model stops at {stops}, the template ends answers with {template.stop_ids}"
        advice = "add these ids to eos_token_id in generation_config.json: else answers run on"
        some = len(missing) == len(template.stop_ids)
        yield judged("end of an answer", "the model stops at the template's end token", found, advice, some)


def conversations(files: tuple[Path, ...], heldout: Path | None, template: ChatTemplate, seq_len: int) -> list[Check]:
    """Return the checks of files of records, for rows of `seq_len` tokens."""
    found: list[Check] = []
    trained: list[Samples] = []
    for path in files:
        found += attempt(
            path.name, "records with trained answers", FORMS, lambda p=path: _read(p, template, seq_len, trained)
        )
    if heldout is not None:
        aside: list[Samples] = []
        found += attempt(heldout.name, "records with answers", FORMS, lambda: _read(heldout, template, seq_len, aside))
        if aside and trained:
            found.append(both(trained, aside[0]))
    return found


def _read(path: Path, template: ChatTemplate, seq_len: int, into: list[Samples]) -> Iterator[Check]:
    broken: list = []
    samples = read_samples(path, template, seq_len, broken=broken)
    into.append(samples)
    stats = samples.stats
    n = stats["conversations"] if "conversations" in stats else len(samples)
    share = stats["targets"] / max(1, stats["tokens"])
    told = f"{n:,} records, {share:.0%} of {stats['tokens']:,} tokens are trained".replace("%", " %")
    advice = "look at samples with fine_tuning.py --show 3: the answers may be marked as not trained"
    yield judged(path.name, "1 to 98 % of the tokens", told, advice, not 0.01 <= share <= 0.98, WARNING)
    lost = {name: stats.get(name, 0) for name in ("cut", "dropped", "beyond", "without_target")} | {
        "broken": len(broken)
    }
    words = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in lost.items() if count) or "all whole"
    advice = f"--data.seq_len {samples.enough} keeps nine in ten whole; broken records are named by fine_tuning.py"
    level = FAULT if sum(lost.values()) > 0.5 * n else WARNING
    bad = sum(lost.values()) > 0.1 * n
    yield judged(f"{path.name}: whole", "nine in ten records are used whole", words, advice, bad, level)


def both(trained: list[Samples], heldout: Samples) -> Check:
    """Return whether held-out records are trained on, too."""
    seen = {key for samples in trained for key in keys(samples)}
    kept = set(keys(heldout))
    n = len(kept & seen)
    advice = "hold out by question: leave out --data.heldout, and --data.heldout_share does it"
    found = f"{n:,} of {len(kept):,} held-out records"
    level = FAULT if n > 0.05 * len(kept) else WARNING
    return judged("held out, and trained", "no record in both", found, advice, n > 0, level)


def keys(samples: Samples) -> Iterator[bytes]:
    """Yield the ids of each sample as bytes."""
    offsets = samples.offsets.astype(np.int64)
    for begin, end in itertools.pairwise(offsets):
        yield samples.ids[begin:end].tobytes()

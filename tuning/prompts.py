"""Questions of held-out records as prompts of the samples that a run writes at every evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chat.samples import Samples
from tokenizer import Tokenizer
from training.samples import MOST_PROMPTS, REAL_TOKENS, Prompt

MOST_RECORDS = 100  # of a task: where its questions are alike, later ones are looked at, too


def questions_of(tasks: Sequence[Samples], texts: int, tokenizer: Tokenizer) -> list[Prompt]:
    """Return the ids before the first answer of some records, the first ones of each task in turn, no two alike.

    texts: number of samples of a record; of a pair the first one has the answer that is preferred.
    """
    prompts: dict[tuple[int, ...], Prompt] = {}
    longest = max((len(samples) for samples in tasks), default=0) // texts
    for number in range(min(longest, MOST_RECORDS)):
        for samples in tasks:
            if number * texts < len(samples) and len(prompts) < MOST_PROMPTS:
                prompt = question_of(samples, number * texts, tokenizer)
                if prompt is not None:
                    prompts.setdefault(tuple(prompt.ids), prompt)
    return list(prompts.values())


def question_of(samples: Samples, number: int, tokenizer: Tokenizer) -> Prompt | None:
    """Return the prompt of one sample; None where nothing stands before what is trained."""
    here = np.s_[int(samples.offsets[number]) : int(samples.offsets[number + 1])]
    ids, mask = samples.ids[here].tolist(), samples.mask[here]
    first = int(mask.argmax())  # 0 where nothing is trained
    end = first + int((~mask[first:]).argmax()) if not mask[first:].all() else len(ids)
    if first == 0:
        return None
    return Prompt(tokenizer.decode(ids[:first]).strip(), ids[:first], tokenizer.decode(ids[first:end][:REAL_TOKENS]))

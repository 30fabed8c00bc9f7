"""Our models in lm-evaluation-harness (bash setup.sh --extra eval), with all of its tasks and options.

    python -m evaluation.harness run --model little-llama --model_args pretrained=DIR --tasks hellaswag --batch_size 32

The model arguments: pretrained (directory of a model, adapter or run, quantized or not), base (of an adapter), dtype
(fp32, bf16 or fp16), device, max_length. The beginning that requests share is computed once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chat.jinja import BEGIN, BREAK, FINISH
from checkpoint.extend import set_length
from checkpoint.locate import find_model, read_from
from cli.extras import need
from cli.progress import Progress
from decoding.params import SamplingParams, shared_length
from evaluation.likelihood import MOST_PADDING, SHORTEST_PREFIX, Likelihood, Pair, log_likelihoods, windows
from hardware import DTYPES, choose_device
from model import Transformer
from serving.assistant import Assistant, first_id, load_assistant, usable_template
from serving.streaming import StopStrings
from tokenizer import Tokenizer
from training.checksums import MOST_BYTES, check_models

NAME = "little-llama"
BLOCK = 8  # batches that are handed to `log_likelihoods` at a time


class Group(NamedTuple):
    """Pairs that are computed together."""

    members: list[int]
    contexts: int
    """number of different contexts"""
    shared: int
    """number of first ids that all contexts share"""


def alike(pairs: Sequence[Pair], most: int) -> Iterator[list[int]]:
    """Yield the indices of pairs that are computed together, at most `most` at a time: those whose contexts have a long
    beginning in common, and others as long as little of such beginnings is lost."""
    before: Group | None = None
    for group in _beginnings(pairs, most):
        both = before and _merge(before, group, pairs)
        if both and len(both.members) <= most and _lost(before, both) + _lost(group, both) <= MOST_PADDING:
            before = both
            continue
        if before:
            yield before.members
        before = group
    if before:
        yield before.members


def _beginnings(pairs: Sequence[Pair], most: int) -> Iterator[Group]:
    """Yield pairs whose contexts have a long beginning in common, in the order of their contexts."""
    group: Group | None = None
    for i in sorted(range(len(pairs)), key=lambda i: tuple(pairs[i].context)):
        context = pairs[i].context
        alone = Group([i], 1, len(context))
        if group is None:
            group = alone
            continue
        both, longest = _merge(group, alone, pairs), len(pairs[group.members[0]].context)
        # a text that begins otherwise would shorten what the whole group shares
        if len(both.members) > most or (longest > 4 * SHORTEST_PREFIX and both.shared < longest // 2):
            yield group
            group = alone
        else:
            group = both
    if group:
        yield group


def _merge(one: Group, two: Group, pairs: Sequence[Pair]) -> Group:
    """Return two groups as one; the contexts of `two` follow those of `one` in order."""
    last, first = pairs[one.members[-1]].context, pairs[two.members[0]].context
    shared = min(one.shared, two.shared, shared_length(last, first))
    return Group([*one.members, *two.members], one.contexts + two.contexts - (last == first), shared)


def _lost(group: Group, both: Group) -> int:
    """Return how many more ids are computed where `both` are a group: what contexts share is computed once."""
    return (group.shared - both.shared) * (group.contexts - 1)


def score_pairs(model: Transformer, pairs: Sequence[Pair], batch_size: int, progress: Progress) -> list[Likelihood]:
    """Return the likelihood of each pair, in order; pairs that begin alike are computed together."""
    results: list[Likelihood] = [Likelihood(0.0, False, False)] * len(pairs)
    for group in alike(pairs, BLOCK * batch_size):
        found = log_likelihoods(model, [pairs[i] for i in group], batch_size)
        for i, likelihood in zip(group, found):
            results[i] = likelihood
        progress.add(len(group))
    return results


def sampling(options: dict[str, Any]) -> SamplingParams:
    """Return the settings of decoding in a request's `generation_kwargs`: greedy unless it says otherwise."""
    sampled = options.get("do_sample", options.get("temperature", 0) > 0)
    return SamplingParams(
        temperature=options.get("temperature", 1.0) if sampled else 0,
        top_p=options.get("top_p", 1.0) if sampled else 1.0,
        top_k=options.get("top_k", 0) if sampled else 0,
        max_new_tokens=options.get("max_gen_toks", 256),
    )


def render_chat(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Return the text of a conversation for `encode_chat`. Raises ValueError for a model without a chat template."""
    template = usable_template(tokenizer)
    if template is None:
        raise ValueError("this model has no chat template: leave out --apply_chat_template")
    return template.check(messages, add_generation_prompt).replace(BEGIN, "").replace(FINISH, "")


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which the names of special tokens are these, except behind `BREAK`."""
    ids: list[int] = []
    names = sorted(tokenizer.special, key=len, reverse=True)
    for part in re.split(f"(?<!{BREAK})({'|'.join(map(re.escape, names))})", text):
        if part in tokenizer.special:
            ids.append(tokenizer.special[part])
        elif part:
            ids += tokenizer.encode(part.replace(BREAK, ""), follows_special=bool(ids))
    begins = list(tokenizer.begins)
    return ids if ids[: len(begins)] == begins else [*begins, *ids]


def answer_texts(
    assistant: Assistant, prompts: Sequence[list[int]], options: dict[str, Any], batch_size: int
) -> Iterator[str]:
    """Yield the answer to each prompt, up to the first of the texts in `options["until"]`."""
    until, params = options.get("until") or [], sampling(options)
    strings = StopStrings(assistant.tokenizer, [until] if isinstance(until, str) else until)
    # an answer needs its place in the window: the beginning of a longer prompt is left out
    room = max(1, assistant.model.args.max_seq_len - params.max_new_tokens)
    asked = dataclasses.replace(assistant, stop_strings=strings)
    return asked.answers([prompt[-room:] for prompt in prompts], params, batch_size)


class Requests:
    """A model of ours behind the interface of lm-evaluation-harness; see the arguments above."""

    def __init__(self, pretrained: str, batch_size: int | str = 32, device: str | None = None, **more: Any) -> None:
        super().__init__()
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else 32
        self.assistant = load(pretrained, device or "auto", **more)
        self.chats = False  # whether texts are conversations that a template has rendered

    @property
    def eot_token_id(self) -> int:
        return self.assistant.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return first_id(self.assistant.tokenizer)

    @property
    def max_length(self) -> int:
        """The window of the model in tokens."""
        return self.assistant.model.args.max_seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if self.chats:
            return encode_chat(self.assistant.tokenizer, string)
        begins = [] if add_special_tokens is False else self.assistant.tokenizer.begins
        return [*begins, *self.assistant.tokenizer.encode(string)]

    @property
    def tokenizer_name(self) -> str:
        return str(self.assistant.directory)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = usable_template(self.assistant.tokenizer) if chat_template else None
        return template and template.jinja

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self.chats = True
        return render_chat(self.assistant.tokenizer, chat_history, add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        with Progress("scoring", "requests", total=len(pairs), active=not disable_tqdm) as progress:
            found = score_pairs(self.assistant.model, pairs, self.batch_size, progress)
        results = [(each.logprob, each.greedy) for each in found]
        for (texts, _, _), result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        pairs: list[tuple[int, Pair]] = []
        for i, request in enumerate(requests):
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            pairs += [(i, pair) for pair in windows(ids, self.max_length, self.max_length)]
        with Progress("scoring", "windows", total=len(pairs), active=not disable_tqdm) as progress:
            found = score_pairs(self.assistant.model, [pair for _, pair in pairs], self.batch_size, progress)
        sums = [0.0] * len(requests)
        for (i, _), likelihood in zip(pairs, found):
            sums[i] += likelihood.logprob
        for request, logprob in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # requests with the same settings are answered together
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for settings, members in groups.items():
            texts = [requests[i].args[0] for i in members]
            prompts = [self.tok_encode(text) for text in texts]
            found = answer_texts(self.assistant, prompts, json.loads(settings), self.batch_size)
            for i, answer in zip(members, found):
                answers[i] = answer
                self.cache_hook.add_partial("generate_until", requests[i].args, answer)
        return answers


def adapter() -> type:
    """Return the class of our models for lm-evaluation-harness. Raises ImportError where it is not installed."""
    from lm_eval.api.model import TemplateLM

    return type("LittleLlama", (Requests, TemplateLM), {"__doc__": Requests.__doc__})


def load(
    pretrained: str, device: str, base: str | None = None, dtype: str = "fp32", max_length: int | None = None, **_: Any
) -> Assistant:
    """Load a model by the arguments that the harness was given."""
    options = {"base": Path(base) if base else None, "raw": True}
    directory = find_model(Path(pretrained))
    check_models(read_from(directory, options["base"]), MOST_BYTES)
    assistant = load_assistant(directory, choose_device(device), DTYPES[dtype], **options)
    if max_length is not None:
        set_length(assistant.model, int(max_length))
    return assistant


def main() -> None:
    """Run the command line of lm-evaluation-harness with our models among its own."""
    need("evaluation.harness", "eval", "lm_eval")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    torch.set_grad_enabled(False)
    register_model(NAME)(adapter())
    cli_evaluate()


if __name__ == "__main__":
    main()

"""Our models in lm-evaluation-harness (bash setup.sh --extra eval), with all of its tasks and options.

    python -m evaluation.harness run --model little-llama --model_args pretrained=DIR --tasks hellaswag --batch_size 32

The model arguments: pretrained (directory of a model, adapter or run, quantized or not), base (of an adapter), dtype
(fp32, bf16 or fp16), device, max_length. The beginning that requests share is computed once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint.extend import set_length
from checkpoint.locate import find_model
from cli.extras import need
from cli.progress import Progress
from decoding.params import SamplingParams
from evaluation.likelihood import SHORTEST_PREFIX, Pair, common_prefix, log_likelihoods, windows
from hardware import DTYPES, choose_device
from serving.assistant import first_id, load_assistant
from serving.streaming import StopStrings

NAME = "little-llama"
BLOCK = 8  # batches that are handed to `log_likelihoods` at a time


def alike(pairs: Sequence[Pair], most: int) -> Iterator[list[int]]:
    """Yield the indices of pairs whose contexts have a long beginning in common, at most `most` at a time."""
    order = sorted(range(len(pairs)), key=lambda i: tuple(pairs[i].context))
    group: list[int] = []
    for i in order:
        longest = len(pairs[group[0]].context) if group else 0
        shared = len(common_prefix([pairs[j].context for j in (group[0], i)])) if group else 0
        # a text that begins otherwise would shorten what the whole group shares
        if group and (len(group) == most or (longest > 4 * SHORTEST_PREFIX and shared < longest // 2)):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def adapter() -> type:
    """Return the class of our models for lm-evaluation-harness. Raises ImportError where it is not installed."""
    from lm_eval.api.model import TemplateLM

    class LittleLlama(TemplateLM):
        """A model of ours behind the interface of lm-evaluation-harness."""

        def __init__(
            self,
            pretrained: str,
            base: str | None = None,
            dtype: str = "fp32",
            device: str | None = None,
            batch_size: int | str = 32,
            max_batch_size: int | None = None,
            max_length: int | None = None,
        ) -> None:
            super().__init__()
            self.batch_size = int(batch_size) if str(batch_size).isdecimal() else 32
            options = {"base": Path(base) if base else None, "raw": True}
            directory = find_model(Path(pretrained))
            self.assistant = load_assistant(directory, choose_device(device or "auto"), DTYPES[dtype], **options)
            if max_length is not None:
                set_length(self.assistant.model, int(max_length))
            self.own = self.assistant.tokenizer

        @property
        def eot_token_id(self) -> int:
            return self.own.eos_id

        @property
        def prefix_token_id(self) -> int:
            return first_id(self.own)

        @property
        def max_length(self) -> int:
            """The window of the model in tokens."""
            return self.assistant.model.args.max_seq_len

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            begins = [] if add_special_tokens is False else self.own.begins
            return [*begins, *self.own.encode(string)]

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = [Pair(context, continuation) for _, context, continuation in requests]
            results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
            with Progress("scoring", "requests", total=len(pairs), active=not disable_tqdm) as progress:
                for group in alike(pairs, BLOCK * self.batch_size):
                    found = log_likelihoods(self.assistant.model, [pairs[i] for i in group], self.batch_size)
                    for i, likelihood in zip(group, found):
                        results[i] = (likelihood.logprob, likelihood.greedy)
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                    progress.add(len(group))
            return results

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
                pairs = list(windows(ids, self.max_length, self.max_length))
                sums.append(sum(each.logprob for each in log_likelihoods(self.assistant.model, pairs, self.batch_size)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
            return sums

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            answers = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            for settings, members in groups.items():
                options = json.loads(settings)
                until = options.get("until") or []
                until = [until] if isinstance(until, str) else until
                sampled = options.get("do_sample", options.get("temperature", 0) > 0)
                params = SamplingParams(
                    temperature=options.get("temperature", 1.0) if sampled else 0,
                    top_p=options.get("top_p", 1.0),
                    top_k=options.get("top_k", 0),
                    max_new_tokens=options.get("max_gen_toks", 256),
                )
                assistant = dataclasses.replace(self.assistant, stop_strings=StopStrings(self.own, until))
                # an answer needs its place in the window: the beginning of a longer prompt is left out
                room = self.max_length - params.max_new_tokens
                prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
                for i, answer in zip(members, assistant.answers(prompts, params, self.batch_size)):
                    answers[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
            return answers

    return LittleLlama


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

"""A conversation with a model, kept in its cache from turn to turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from attention.cache import keep_prefix
from chat.template import ChatTemplate
from decoding import generate
from decoding.params import SamplingParams
from model import Transformer
from serving.streaming import StopStrings
from tokenizer import Tokenizer


class ChatSession:
    """A conversation that keeps its cache, so that each turn feeds only what is new.

    `messages` is the history; `forgotten` counts the oldest turns that had to go because the context was full. With
    sinks in its cache no turn has to: the conversation goes on for ever, and the model forgets the middle of it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        system: str = "",
        cache: str = "static",
        stop: StopStrings | None = None,
        stream: Callable[..., Iterator[int]] | None = None,
    ) -> None:
        """cache: its kind (attention/cache.py). stop: texts that end an answer, beside the template's own ids. stream:
        another way to get the ids that follow a prompt than `generate.stream` of the model, called as that is, such
        as `Speculator.stream`."""
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.system = [{"role": "system", "content": system}] if system else []
        self.stop = stop or StopStrings(tokenizer)
        self._stream = stream or partial(generate.stream, model)
        self.cache = model.make_cache(1, kind=cache)
        self.asked = 0
        self._fed: list[int] = []  # the cache holds the first `cache.length` of these ids
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages: list[dict] = []
        self.forgotten = 0

    def ask(self, text: str, params: SamplingParams) -> Iterator[int]:
        """The ids of the answer, one by one, for `text_pieces`. What was said enters the history, also when the
        iterator is closed early. Every question draws with another seed, so that asking again may give another answer.

        Raises ValueError, and leaves the history as it is, when the question alone does not fit the context.
        """
        messages, forgotten = [*self.messages, {"role": "user", "content": text}], 0
        context = self.cache.max_len
        room = min(params.max_new_tokens, context // 2)  # for the answer
        prompt, _ = self.template.encode(self.system + messages, add_generation_prompt=True)
        while len(prompt) + room > context and len(messages) > 1:
            messages, forgotten = messages[2:], forgotten + 1  # the oldest question and its answer go
            prompt, _ = self.template.encode(self.system + messages, add_generation_prompt=True)
        generate.check_prompts(self.model, [prompt], context)
        params = replace(params, seed=params.seed + self.asked)
        self.asked, self.forgotten = self.asked + 1, self.forgotten + forgotten
        return self._answer(messages, prompt, params)

    def _answer(self, messages: list[dict], prompt: list[int], params: SamplingParams) -> Iterator[int]:
        keep_prefix(self.cache, prompt, self._fed)
        self._fed = list(prompt)
        try:
            for token in self._stream(prompt, params, self.template.stop_ids, self.cache):
                self._fed.append(token)
                yield token
                if self.stop.ended(self._fed[len(prompt) :]):
                    break
        finally:
            answer = self.stop.before(self.tokenizer.decode(self._fed[len(prompt) :]))
            # A question without any answer would leave two questions in a row, which no template knows.
            self.messages = [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]

"""A conversation with an assistant that keeps its cache from turn to turn."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import replace

from attention.cache import keep_prefix
from cli.progress import say
from decoding.feeder import check_prompts
from decoding.params import SamplingParams
from serving.assistant import Assistant
from serving.streaming import text_pieces


def recent(
    assistant: Assistant, messages: list[dict], params: SamplingParams, context: int
) -> tuple[list[dict], list[int], int]:
    """Return the newest turns of a conversation that fit in the context and leave room for an answer, their prompt, and
    the number of older turns that are left out. The last question is kept, whatever its length."""
    room, forgotten = min(params.max_new_tokens, context // 4), 0
    prompt = assistant.encode(messages)
    while len(prompt) + room > context and len(messages) > 1:
        messages, forgotten = messages[2:], forgotten + 1  # the oldest question and its answer
        prompt = assistant.encode(messages)
    return messages, prompt, forgotten


class ChatSession:
    """A conversation with a cache, so that each turn feeds only the new ids.

    `messages` is the history. `forgotten` counts the oldest turns that were dropped because the context was full; with
    a cache of kind sinks no turn is dropped, and the model forgets the middle of the conversation.
    """

    def __init__(self, assistant: Assistant) -> None:
        """The assistant needs a chat template."""
        self.assistant = assistant
        self.cache = assistant.model.make_cache(1, kind=assistant.cache)
        self.asked = 0
        self._fed: list[int] = []  # the cache holds the first `cache.length` of these ids
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages: list[dict] = []
        self.forgotten = 0

    def reply(self, text: str, params: SamplingParams) -> Generator[str, None, None]:
        """Yield the answer to `text` in pieces of text, with a notice when turns are forgotten; see `ask`."""
        before = self.forgotten
        with contextlib.closing(self.ask(text, params)) as ids:
            if gone := self.forgotten - before:
                say(f"(the context is full; oldest turns forgotten: {gone})")
            yield from text_pieces(self.assistant.tokenizer, ids, self.assistant.stop_strings)

    def ask(self, text: str, params: SamplingParams) -> Generator[int, None, None]:
        """Return an iterator over the ids of the answer. The answer enters the history when the iterator ends or is
        closed early. The seed grows by 1 with each question, so that the same question may get another answer.

        Raises ValueError, and leaves the history as it is, when the question alone does not fit the context.
        """
        messages, context = [*self.messages, {"role": "user", "content": text}], self.cache.max_len
        messages, prompt, forgotten = recent(self.assistant, messages, params, context)
        check_prompts(self.assistant.model, [prompt], context)
        params = replace(params, seed=params.seed + self.asked)
        self.asked, self.forgotten = self.asked + 1, self.forgotten + forgotten
        return self._answer(messages, prompt, params)

    def _answer(self, messages: list[dict], prompt: list[int], params: SamplingParams) -> Iterator[int]:
        keep_prefix(self.cache, prompt, self._fed)
        self._fed = list(prompt)
        try:
            for token in self.assistant.stream(prompt, params, self.cache):
                self._fed.append(token)
                yield token
        finally:
            answer = self.assistant.stop_strings.before(self.assistant.tokenizer.decode(self._fed[len(prompt) :]))
            # A question without any answer would leave two questions in a row, which no template accepts.
            self.messages = [*messages, {"role": "assistant", "content": answer}] if answer else messages[:-1]

"""A conversation with an assistant that keeps its cache from turn to turn."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import replace

from attention.cache import keep_prefix
from chat.messages import check_messages
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

    def set_system(self, text: str) -> None:
        """Put a system message before the conversation; "": none. Raises ValueError where the template has no place for
        one, or where nothing else would fit into the context."""
        assistant, messages = replace(self.assistant, system=text), [{"role": "user", "content": ""}]
        prompt = assistant.encode(messages)
        if text and prompt == replace(assistant, system="").encode(messages):
            raise ValueError("the chat template of this model has no place for a system message")
        check_prompts(assistant.model, [prompt], self.cache.max_len)
        self.assistant = assistant

    def all_messages(self) -> list[dict]:
        """Return the conversation with the system message."""
        system = self.assistant.system
        return [{"role": "system", "content": system}] * bool(system) + self.messages

    def restore(self, messages: list[dict]) -> None:
        """Go on with another conversation, which ends with an answer. Raises ValueError, and leaves all as it is, where
        this model cannot go on with it."""
        check_messages(messages)
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        assistant = self.assistant if system is None else replace(self.assistant, system=system)
        messages = messages[system is not None :]
        assistant.encode([*messages, {"role": "user", "content": ""}])
        self.assistant, self.messages, self.forgotten = assistant, messages, 0

    def retry(self, params: SamplingParams) -> Generator[str, None, None]:
        """Yield another answer to the last question. It takes the place of the old one, which stays where none comes.
        Raises ValueError where nothing was asked."""
        if not self.messages:
            raise ValueError("there is no question to answer again")
        before = self.messages
        at = max(i for i, message in enumerate(before) if message["role"] == "user")

        def pieces() -> Generator[str, None, None]:
            self.messages = before[:at]
            try:
                yield from self.reply(before[at]["content"], params)
            finally:
                if self.messages[-2:-1] != [before[at]]:  # no answer came
                    self.messages = before

        return pieces()

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

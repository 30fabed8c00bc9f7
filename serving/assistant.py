"""An assistant: a loaded model with all that turns messages into ids and ids into the text of an answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attention.cache import KVCache, cache_class
from chat.messages import check_messages
from chat.template import ChatTemplate, load_template
from checkpoint.directory import load_model
from checkpoint.locate import find_base, find_model, has_tokenizer, is_adapter, read_from, read_stop_ids
from cli.progress import say
from decoding.decoder import Decoder
from decoding.generate import Sampled
from decoding.pages import in_huge_pages
from decoding.params import SamplingParams, Stop
from decoding.speculative import DraftModel, PromptLookup, Speculative
from model import Transformer
from serving.streaming import StopStrings, text_pieces
from tokenizer import MARKERS, Tokenizer, load_tokenizer


@dataclass
class Assistant:
    """A model, its tokenizer and chat template, and how it answers."""

    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None: the assistant continues texts and has no conversations"""
    decoder: Decoder | None = None
    """way to decode; None: one id after the other (`Sampled`)"""
    stop_strings: StopStrings | None = None
    """texts that end an answer, beside the stop ids of the template"""
    system: str = ""
    """system message before every conversation that has none"""
    cache: str = "static"
    """kind of key-value cache (attention/cache.py)"""
    directory: Path | None = None
    """where the model lies"""
    stop_ids: frozenset[int] = frozenset()
    """more ids that end an answer: those of the model's generation_config.json"""

    def __post_init__(self) -> None:
        self.decoder = self.decoder or Sampled(self.model)
        self.stop_strings = self.stop_strings or StopStrings(self.tokenizer)

    @property
    def stop(self) -> Stop:
        """What ends an answer: stop ids of the template (without one: eos) and of the model, and stop strings."""
        ids = {self.tokenizer.eos_id} - {None} if self.template is None else self.template.stop_ids
        return Stop(sorted({*ids, *self.stop_ids}), self.stop_strings.ended)

    @property
    def longest(self) -> int:
        """The longest prompt, in tokens."""
        return sys.maxsize if cache_class(self.cache).endless else self.model.args.max_seq_len

    def encode(self, messages: list[dict]) -> list[int]:
        """Return the prompt of a conversation; without a template, of the text that is the only message."""
        if self.template is not None:
            if self.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            return self.template.encode(messages, add_generation_prompt=True)[0]
        check_messages(messages)
        if len(messages) != 1:
            raise ValueError("a model without a chat template takes a single text, not a conversation")
        return self.encode_text(messages[0]["content"])

    def encode_text(self, text: str) -> list[int]:
        """Return the prompt of a text to continue: it begins as texts begin in training; never empty."""
        start = self.tokenizer.begins or ([self.tokenizer.eos_id] if has_markers(self.tokenizer) else [])
        return [*start, *self.tokenizer.encode(text)] or [first_id(self.tokenizer)]

    def stream(self, prompt: Sequence[int], params: SamplingParams, cache: KVCache | None = None) -> Iterator[int]:
        """Return an iterator over the ids of the answer to one prompt. cache: see `Decoder.stream`."""
        return self.decoder.stream(prompt, params, self.stop, self.cache if cache is None else cache)

    def answers(self, prompts: Sequence[Sequence[int]], params: SamplingParams, batch_size: int) -> Iterator[str]:
        """Yield the text of the answer to each prompt, in order, with progress on stderr."""
        return map(self.text, self.decoder.answers(prompts, params, self.stop, self.cache, batch_size))

    def reply(self, question: str, params: SamplingParams) -> Iterator[str]:
        """Return an iterator over the pieces of text that answer one question, or that continue a text."""
        ids = self.stream(self.encode([{"role": "user", "content": question}]), params)
        return text_pieces(self.tokenizer, ids, self.stop_strings)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, up to a stop string; a continuation keeps a space at its beginning."""
        if self.template is None:
            return "".join(text_pieces(self.tokenizer, ids, self.stop_strings))
        return self.stop_strings.before(self.tokenizer.decode(ids))


def load_assistant(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    base: Path | None = None,
    raw: bool = False,
    stop: Sequence[str] = (),
    system: str = "",
    cache: str = "static",
) -> Assistant:
    """Load the model, or the base with its adapter merged, in `directory`.

    base: directory of the model that an adapter belongs to; None: the one that the adapter names. raw: without a chat
    template. stop: texts that end an answer. system, cache: see `Assistant`. Raises ValueError where model and
    tokenizer do not belong together.
    """
    adapter = directory if is_adapter(directory) else None
    if adapter is not None:
        base = find_base(adapter, base)
        home = adapter if has_tokenizer(adapter) else base
    elif base is None:
        home = directory
    else:
        raise ValueError(f"--base is for an adapter, and {directory} is a whole model: leave it out")
    tokenizer = load_tokenizer(home)
    stop_ids = frozenset(i for i in read_stop_ids(home) or () if i < tokenizer.vocab_size)
    stop_strings = StopStrings(tokenizer, stop)  # refused before a large model is loaded
    model = load_model(directory, device, dtype, base=base)
    in_huge_pages(model.eval())
    if tokenizer.vocab_size > model.args.vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} ids, the model {model.args.vocab_size}: "
            "they do not belong together"
        )
    model.n_ids = tokenizer.vocab_size  # rows beyond are padding
    template = None if raw else usable_template(tokenizer)
    settings = {"stop_strings": stop_strings, "stop_ids": stop_ids, "system": system, "cache": cache}
    return Assistant(model, tokenizer, template, directory=directory, **settings)


def open_draft(assistant: Assistant, draft: str, n_draft: int) -> Speculative:
    """Return a decoder for the assistant's model that guesses `n_draft` tokens ahead.

    draft: the directory of a smaller model, or "lookup" (guess from the text itself). Raises ValueError when the draft
    has another tokenizer.
    """
    model = assistant.model
    if draft == "lookup":
        return Speculative(model, PromptLookup(assistant.tokenizer.vocab_size), n_draft)
    directory = find_model(Path(draft))
    home = next(filter(has_tokenizer, read_from(directory)), directory)
    if load_tokenizer(home).sha256() != assistant.tokenizer.sha256():
        raise ValueError(
            f"the draft in {directory} has another tokenizer than {assistant.directory}: "
            "a draft needs the vocabulary of the model it guesses for"
        )
    draft_model = load_model(directory, model.device, model.dtype).eval()
    in_huge_pages(draft_model)
    draft_model.n_ids = assistant.tokenizer.vocab_size
    return Speculative(model, DraftModel(draft_model), n_draft)


def first_id(tokenizer: Tokenizer) -> int:
    """Return the id that stands before a text: bos; eos where there is none, and in our vocabularies, in whose bins eos
    stands before every text."""
    return tokenizer.eos_id if tokenizer.bos_id is None or has_markers(tokenizer) else tokenizer.bos_id


def has_markers(tokenizer: Tokenizer) -> bool:
    """Return whether the vocabulary is one of ours."""
    return all(marker in tokenizer.special for marker in MARKERS)


def usable_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the chat template that came with a tokenizer, or the one that its vocabulary is made for; None where there
    is none, or where it cannot be used (then with a notice)."""
    if not tokenizer.chat_template and not has_markers(tokenizer):
        return None
    try:
        return load_template(tokenizer)
    except ValueError as error:
        say(f"this model's chat template cannot be used, so it only continues texts: {error}")
        return None

"""A model directory as something that answers: finding it, loading it, and the way from messages to ids and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from chat.messages import check_messages
from chat.template import ChatTemplate, load_template
from checkpoint.directory import load_model
from checkpoint.locate import find_base, find_model, has_tokenizer, is_adapter
from cli.progress import tell
from decoding import generate
from decoding.params import SamplingParams
from decoding.speculative import DraftModel, PromptLookup, Speculator
from model import Transformer
from serving.streaming import StopStrings, text_pieces
from tokenizer import MARKERS, Tokenizer, load_tokenizer


@dataclass
class Assistant:
    """A loaded model and what turns its ids into text; `template` is None when texts are only continued."""

    directory: Path
    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate | None
    system: str
    stop: StopStrings
    """texts at which an answer ends"""
    stream: Callable[..., Iterator[int]]
    """`generate.stream` of this model, or what does the same in another way"""
    cache: str = "static"
    """the kind of cache in which it answers"""

    @property
    def longest(self) -> int:
        """The longest prompt, in tokens."""
        return sys.maxsize if self.cache == "sinks" else self.model.args.max_seq_len

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which an answer ends."""
        eos = self.tokenizer.eos_id
        return self.template.stop_ids if self.template is not None else [] if eos is None else [eos]

    def encode(self, messages: list[dict]) -> list[int]:
        """The ids from which the model goes on; without a template the only message is the text itself."""
        if self.template is not None:
            if self.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            return self.template.encode(messages, add_generation_prompt=True)[0]
        check_messages(messages)
        if len(messages) != 1:
            raise ValueError("a model without a chat template takes a single text, not a conversation")
        # Our token bins part documents by eos alone, so that is what a text begins after.
        ours = self.tokenizer.bos_id is None or has_markers(self.tokenizer)
        start = self.tokenizer.eos_id if ours else self.tokenizer.bos_id
        return [start] * (start is not None) + self.tokenizer.encode(messages[0]["content"])

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer, up to a stop string; that of a continuation keeps the space it may begin with."""
        if self.template is None:
            return "".join(text_pieces(self.tokenizer, ids, self.stop))
        return self.stop.before(self.tokenizer.decode(ids))

    def reply(self, question: str, params: SamplingParams) -> Iterator[str]:
        """The answer to one question, or what follows a text, piece by piece."""
        ids = self.encode([{"role": "user", "content": question}])
        return text_pieces(self.tokenizer, self.stream(ids, params, self.stop_ids, self.cache), self.stop)


def load_assistant(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    system: str = "",
    raw: bool = False,
    stop: Sequence[str] = (),
    cache: str = "static",
    base: Path | None = None,
) -> Assistant:
    """The model in `directory`. raw: without a chat template, whatever the tokenizer has; stop, cache: see `Assistant`.
    base: of an adapter, the model it belongs to; None: the one that the adapter names.

    Raises ValueError where model and tokenizer do not belong together.
    """
    adapter = directory if is_adapter(directory) else None
    if adapter is not None:
        base = find_base(adapter, base)
        tokenizer = load_tokenizer(adapter if has_tokenizer(adapter) else base)
    elif base is None:
        tokenizer = load_tokenizer(directory)
    else:
        raise ValueError(f"--base is for an adapter, and {directory} is a whole model: leave it out")
    stop_strings = StopStrings(tokenizer, stop)
    model = load_model(directory, device, dtype, base=base)
    model.eval()
    if tokenizer.vocab_size > model.args.vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} ids, the model {model.args.vocab_size}: "
            "they do not belong together"
        )
    template = None if raw else usable_template(tokenizer)
    return Assistant(
        directory, model, tokenizer, template, system, stop_strings, partial(generate.stream, model), cache
    )


def speculator(speaker: Assistant, draft: str, n_draft: int) -> Speculator:
    """What makes a speaker's answers faster. draft: a model directory, or "lookup" (guesses from what the text has said
    before). Raises ValueError when the draft has another vocabulary."""
    model = speaker.model
    if draft == "lookup":
        return Speculator(model, PromptLookup(model.args.vocab_size), n_draft)
    directory = find_model(Path(draft))
    if load_tokenizer(directory).sha256() != speaker.tokenizer.sha256():
        raise ValueError(
            f"the draft in {directory} has another tokenizer than {speaker.directory}: "
            "a draft needs the vocabulary of the model it guesses for"
        )
    return Speculator(model, DraftModel(load_model(directory, model.device, model.dtype).eval()), n_draft)


def has_markers(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary is one of ours."""
    return all(marker in tokenizer.special for marker in MARKERS)


def usable_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that came with a tokenizer, or that its vocabulary is made for, if there is one."""
    if not tokenizer.chat_template and not has_markers(tokenizer):
        return None
    try:
        return load_template(tokenizer)
    except ValueError as error:
        tell(f"this model's chat template cannot be used, so it only continues texts: {error}")
        return None

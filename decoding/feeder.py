"""The call of the model in decoding: ids go in, logits come out, and a cache remembers what has been fed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from attention.cache import KVCache
from decoding import cpu_step
from decoding.params import Ids
from model import Transformer


class Feeder:
    """The one place where a model is called: ids go in, logits come out, and `cache` remembers."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.device = model.device
        self.n_ids = drawable(model)
        self.few = cpu_step.most_tokens(model)

    @torch.inference_mode()
    def __call__(self, runs: Sequence[Ids], past: Sequence[int], n: int = 1) -> torch.Tensor:
        """Feed B runs of ids, of unequal lengths, run i from position past[i] on. Return the logits (B, n, V) after
        each of the last n ids of every run; V leaves out rows of padding (see `drawable`).

        An interrupted pass (Ctrl-C) leaves the length of the cache as it was, because some layers have stored the new
        tokens and others have not.
        """
        width, length = max(map(len, runs)), self.cache.length
        if sum(map(len, runs)) <= self.few and self.step is not None:
            return self.step(runs, past, n)[..., : self.n_ids]
        # Pad on the right: the next tokens of a row overwrite its padding before any query can see it.
        lengths = [n + len(ids) for n, ids in zip(past, runs)]
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in runs], device=self.device)  # (B, T)
        positions = torch.tensor(past, device=self.device)[:, None] + torch.arange(width, device=self.device)  # (B, T)
        try:
            hidden = self.model.hidden(tokens, positions=positions, cache=self.cache, lengths=lengths)  # (B, T, dim)
        except BaseException:
            self.cache.truncate(length)
            raise
        # The head is the largest product of a small model: compute it for the last n tokens of each row only.
        ends = torch.tensor([len(ids) for ids in runs], device=self.device)
        last = ends[:, None] + torch.arange(-n, 0, device=self.device)  # (B, n)
        logits = self.model.logits(hidden[torch.arange(len(runs), device=self.device)[:, None], last])
        return logits[..., : self.n_ids]

    @cached_property
    def step(self) -> cpu_step.Step | None:
        """The compiled step, which feeds a few ids faster; None where it does not apply."""
        return cpu_step.stepper(self.model, self.cache)


def drawable(model: Transformer) -> int:
    """Return the number of ids that may be drawn: all that the model has, or `model.n_ids` where that is set.

    Whoever loads a model with its tokenizer sets `n_ids` to the size of the tokenizer: rows of the embedding beyond it
    are padding, and no text belongs to them.
    """
    return getattr(model, "n_ids", model.args.vocab_size)


@contextlib.contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Put the model in evaluation mode for the length of the context."""
    if not model.training:  # the usual case; a walk over all modules costs more than the step of a small model
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def check_prompts(model: Transformer, prompts: Sequence[Ids], longest: int | None = None, cached: int = 0) -> None:
    """Raise ValueError for a prompt that is empty, holds ids the model does not have, is longer than `longest` tokens
    (default: the model's context), or lies within the first `cached` ids of the text, so that nothing is left to feed.
    """
    longest, vocab_size = longest or model.args.max_seq_len, model.args.vocab_size
    for i, prompt in enumerate(prompts):
        where = f"prompt {i + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise ValueError(f"{where} is empty; give at least one id, such as the tokenizer's bos")
        if len(prompt) > longest:
            raise ValueError(f"{where} is {len(prompt)} tokens long, the model takes {longest}; shorten it")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(f"{where} holds id {wrong}, the model has 0..{vocab_size - 1}: is this its tokenizer?")
        if cached >= len(prompt):
            raise ValueError(f"the cache holds {cached} ids, the prompt {len(prompt)}: nothing is left to feed")

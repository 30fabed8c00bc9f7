"""What a model writes in the course of its training: the same prompts at every evaluation, in samples.jsonl, and one of
them every minute for whoever watches.

Sampling has random states of its own and changes no weight, so a run has the same losses with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import torch

from attention import backends
from bins.token_bin import TokenBin
from cli.progress import say
from decoding.generate import generate
from decoding.params import Ids, SamplingParams, Stop
from distributed.single import SingleProcess
from files import read_rows, write_json_lines

FILE = "samples.jsonl"
MOST_PROMPTS = 4  # where the user has named none
PROMPT_TOKENS = 16  # of a held-out document: its first ones
REAL_TOKENS = 64  # of the text that really follows, beside the samples


class Prompt(NamedTuple):
    """What a sample continues."""

    text: str  # as a reader sees it
    ids: Ids
    real: str = ""  # what follows it in the held-out data


class Sampler:
    """Let a model continue `prompts` with up to `tokens` tokens each, and keep the texts beside the log of a run.

    model: the language model itself, also where what is trained is a wrapper around it. decode: ids -> text.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[Prompt],
        tokens: int,
        *,
        decode: Callable[[Ids], str],
        stop_ids: Collection[int],
        n_ids: int,
    ) -> None:
        self.model, self.decode, self.stop = model, decode, Stop(stop_ids)
        self.prompts = [each for each in prompts if len(each.ids) < model.args.max_seq_len]
        self.params = SamplingParams(max_new_tokens=max(1, tokens))
        model.n_ids = n_ids  # rows of the embedding beyond the vocabulary are never drawn
        self.shown, self.last_shown = 0, monotonic()

    def write(self, run: Path, step: int, backend: SingleProcess) -> None:
        """Add the samples of this step to `run/samples.jsonl`, in place of any of this step and of later ones.

        Only the main rank works, and only where it holds the whole model. A run never fails by its samples.
        """
        if not (backend.main and self.prompts and is_whole(self.model, backend)):
            return
        try:
            texts = self.texts(self.prompts)
            before = [row for row in read_rows(run / FILE) if row["step"] < step]
            rows = [
                {"step": step, "prompt": prompt.text, "text": text} | ({"real": prompt.real} if prompt.real else {})
                for prompt, text in zip(self.prompts, texts)
            ]
            write_json_lines(run / FILE, [*before, *rows])
        except (RuntimeError, OSError, ValueError) as error:  # no memory, a full disk
            say(f"no samples of step {step}: {str(error).splitlines()[0]}")

    def is_due(self, minutes: float) -> bool:
        """Return whether `minutes` have passed since a sample was shown; 0: never."""
        return 0 < 60 * minutes <= monotonic() - self.last_shown

    def show(self, step: int, backend: SingleProcess) -> None:
        """Show what the model writes to the next prompt."""
        self.last_shown = monotonic()
        if not (backend.main and self.prompts and is_whole(self.model, backend)):
            return
        prompt = self.prompts[self.shown % len(self.prompts)]
        self.shown += 1
        try:
            lines = f"{prompt.text} | {self.texts([prompt])[0]}".split("\n")
        except RuntimeError as error:  # no memory
            lines = [f"none ({str(error).splitlines()[0]})"]
        say(f"a sample after step {step}: {' / '.join(line for line in lines if line.strip())}")

    def texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return what the model writes after each prompt; prompt i is drawn with seed i."""
        # a name: with "auto" a CPU might compile its own decoding step, which pays only for a chat
        chosen = backends.in_use() if backends.in_use() != "auto" else "sdpa"
        with backends.use(chosen):
            answers = generate(self.model, [prompt.ids for prompt in prompts], self.params, self.stop)
        return [self.decode(answer) for answer in answers]


def is_whole(model: torch.nn.Module, backend: SingleProcess) -> bool:
    """Return whether this rank holds all weights: neither parts of layers, nor some of the layers, nor shards."""
    # FSDP2 makes parameters DTensors and gives modules `unshard`; ZeRO's stage 3 gives parameters an id of DeepSpeed
    sharded = any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in model.parameters())
    sharded = sharded or any(hasattr(module, "unshard") for module in model.modules())
    return backend.data_world == backend.world and not sharded


def beginnings(tokens: TokenBin, decode: Callable[[Ids], str], eos_id: int | None) -> list[Prompt]:
    """Return the first tokens of some documents of a bin as prompts: an eighth of each, at least one, at most 16."""
    prompts = []
    for document in first_documents(tokens, eos_id):
        body = document[:-1] if document[-1:] == [eos_id] else document
        if len(body) < 4:
            continue
        size = min(PROMPT_TOKENS, max(len(tokens.bos) + 1, len(body) // 8))
        # eos, or bos where a bin has it, stands before every document in training
        start = [] if tokens.bos or eos_id is None else [eos_id]
        real = decode(body[size : size + REAL_TOKENS])
        prompts.append(Prompt(decode(body[:size]), [*start, *body[:size]], real))
        if len(prompts) == MOST_PROMPTS:
            break
    return prompts


def first_documents(tokens: TokenBin, eos_id: int | None, most: int = 50) -> Iterable[list[int]]:
    """Yield the first documents of a bin, each cut to the tokens that `beginnings` reads."""
    longest = 8 * PROMPT_TOKENS + REAL_TOKENS
    if tokens.offsets is not None:
        for first, end in zip(tokens.offsets[:most].tolist(), tokens.offsets[1 : most + 1].tolist()):
            yield tokens.tokens[first : min(end, first + longest)].tolist()
        return
    ids = tokens.tokens[: most * longest].tolist()  # a bin without an index: eos ends a document
    while ids:
        end = ids.index(eos_id) + 1 if eos_id in ids else len(ids)
        yield ids[: min(end, longest)]
        ids = ids[end:]

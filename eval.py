"""Talk to a model, let it answer a file of questions, or measure it.

python eval.py                                        a chat with the newest fine-tuned model
python eval.py --prompt '以《江上》为题写一首五言绝句'    one answer; with --logprobs 3 the probability of each token
python eval.py --input questions.jsonl                {"prompt": ...} or {"messages": [...]} a line -> answers
python eval.py --task loss                            held-out loss in nats a token and in bits a byte
python eval.py --task poems                           200 poems under held-out titles: how many keep the form
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attention import CACHES, Choice
from checkpoint.locate import DEFAULT_MODEL, find_model
from cli.args import parse, run
from cli.flags import Needs, check_flags
from cli.progress import say
from decoding.params import SamplingParams
from evaluation.registry import BENCHMARKS, make_task

TASKS = ("chat", *BENCHMARKS)
OWN_PROMPTS = "the other tasks have prompts of their own; remove it"
NEEDS = (
    Needs("prompt", "task", ("chat",), OWN_PROMPTS),
    Needs("input", "task", ("chat",), OWN_PROMPTS),
    Needs("demo", "task", ("chat",), OWN_PROMPTS),
    Needs("output", "prompt", (None,), "one answer is printed and not written to a file; remove it"),
    Needs("output", "demo", (False,), "these answers are printed and not written to a file; remove it"),
    Needs("output", "task", ("chat", "poems"), "the other tasks write no file; remove it"),
    Needs("system", "raw", (False,), "a text without a chat template has no system message; remove it"),
)


@dataclass(frozen=True)
class Args:
    """Talk to a model, let it answer a file of questions, or measure it."""

    model: Path = DEFAULT_MODEL
    """directory of a model, an adapter or a run (then its best); if the default is missing: the newest below out/"""
    base: Path | None = None
    """with an adapter: directory of its base model; None: the one that adapter_config.json names"""
    task: Literal[TASKS] = "chat"  # type: ignore[valid-type]
    """chat: answer (interactively, --prompt, --input, --demo); loss: loss on held-out data; poems: share of poems with
    the right form"""
    prompt: str | None = None
    """answer this and exit"""
    input: Path | None = None
    """answer every record of a file (jsonl, json, csv, parquet) with a "prompt" or "messages" """
    output: Path | None = None
    """file for the answers (default: beside the input) or for the report on poems (default: beside the model)"""
    system: str = ""
    """system message before every conversation"""
    raw: bool = False
    """continue the text itself, without a chat template; always so for a model that has none"""
    demo: bool = False
    """answer the demo prompts, print where the files of the run lie, and exit"""
    demo_prompts: tuple[str, ...] = (
        "以《江上》为题写一首五言绝句",
        "写一首李白风格的七言律诗",
        "接下一句：床前明月光",
    )
    """prompts of --demo"""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    """texts that end an answer; they are not part of it"""
    logprobs: int | None = None
    """after the answer to --prompt, print the log-probability of each token and this many likeliest tokens beside it"""
    num_beams: int = 1
    """above 1: beam search for the likeliest answer with this many beams; needs --temperature 0"""
    length_penalty: float = 1.0
    """beams are compared by log-probability / tokens^length_penalty: above 0 favours long answers, below 0 short"""
    cache: Literal[CACHES] = "static"  # type: ignore[valid-type]
    """key-value cache. int8: a quarter of float32's memory; sinks: attention sinks (StreamingLLM) for endless text; the
    first and the last tokens are kept, those between are forgotten"""
    draft: str | None = None
    """speculative decoding: directory of a smaller model with the same tokenizer, or "lookup" (prompt lookup decoding);
    the same output at temperature 0, in less time"""
    draft_tokens: int = 4
    """number of tokens that --draft guesses ahead"""
    batch_size: int = 50
    """number of answers, or of rows of held-out data, at a time"""
    heldout: Path = Path("data/tiny/heldout.bin")
    """token bin for --task loss"""
    sft_heldout: Path = Path("data/tiny/sft_heldout.jsonl")
    """conversations for --task loss, if the model has a chat template"""
    seq_len: int = 128
    """tokens in a row of --task loss; at most the model's own limit is used"""
    n_poems: int = 200
    """number of poems in --task poems"""
    raw_dir: Path = Path("data/raw")
    """directory with the poems and the rhyme book of --task poems; they are fetched if they are missing"""
    max_seq_len: int | None = None
    """longest text of the model in tokens, prompt and answer; None: what its config.json says"""
    device: str = "auto"
    """auto: cuda, else mps, else cpu"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """type of parameters and arithmetic; auto: bf16 where it is faster (a GPU, or --task loss on some CPUs)"""
    attention: Choice = "auto"
    """implementation of attention; auto: the fastest that works here"""

    def __post_init__(self) -> None:
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"--logprobs should be 0 or more, found {self.logprobs}")
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise ValueError(f"--max_seq_len should be at least 1, found {self.max_seq_len}")
        for name in ("batch_size", "draft_tokens", "seq_len", "n_poems", "num_beams"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} should be at least 1, found {value}")
        check_flags(self, NEEDS)


IS_SET: dict[str, Callable[[Args], bool]] = {
    "--prompt": lambda args: args.prompt is not None,
    "--input": lambda args: args.input is not None,
    "--demo": lambda args: args.demo,
    "--logprobs": lambda args: args.logprobs is not None,
    "--draft_tokens": lambda args: args.draft_tokens != 4,
    "--length_penalty": lambda args: args.length_penalty != 1,
    "--num_beams": lambda args: args.num_beams != 1,
    "--draft": lambda args: args.draft is not None,
    "--cache sinks": lambda args: not cache_class(args.cache).can_rewind,
    "--temperature 0": lambda args: args.sampling.temperature == 0,
    "--repetition_penalty 1": lambda args: args.sampling.repetition_penalty == 1,
}
COMBINATIONS = (  # flag, the flags one of which it needs or, after "no", the flag it excludes; why
    ("--prompt", "no --input", "either one prompt is answered or a file of them"),
    ("--logprobs", "--prompt", "it prints the tokens of one answer"),
    ("--logprobs", "no --num_beams", "it prints the tokens of a sampled or greedy answer"),
    ("--logprobs", "no --draft", "it needs one pass of the model for each token"),
    ("--draft_tokens", "--draft", "it is the number of tokens that a draft guesses"),
    ("--length_penalty", "--num_beams", "it compares the beams of a search"),
    ("--num_beams", "no --draft", "each is a way to decode of its own"),
    ("--num_beams", "--prompt or --input", "a chat shows its answers token by token"),
    ("--num_beams", "--temperature 0", "beam search looks for the likeliest answer and draws nothing"),
    ("--num_beams", "--repetition_penalty 1", "beam search compares the model's own probabilities"),
    ("--draft", "no --input", "it speeds up single answers, and a file is answered in batches"),
    ("--cache sinks", "no --draft", "that cache forgets tokens to which a wrong guess has to go back"),
    ("--cache sinks", "no --num_beams", "that cache forgets tokens to which another beam has to go back"),
)


def check(args: Args) -> None:
    """Raise ValueError for flags that contradict each other."""
    for flag, needs, why in COMBINATIONS:
        if not IS_SET[flag](args):
            continue
        if needs.startswith("no ") and IS_SET[needs[3:]](args):
            raise ValueError(f"{flag} does not go with {needs[3:]}: {why}")
        if not needs.startswith("no ") and not any(IS_SET[need](args) for need in needs.split(" or ")):
            raise ValueError(f"{flag} needs {needs}: {why}")


def announce(args: Args) -> None:
    """Write at once, to a person who waits at a terminal, that the model is being loaded."""
    waiting = args.prompt is not None or args.demo or sys.stdin.isatty()
    if args.task == "chat" and args.input is None and waiting and sys.stderr.isatty():
        say(f"loading {args.model}")


if __name__ == "__main__":
    arguments = parse(Args, "eval")  # before torch is loaded: --help and mistakes are answered at once
    announce(arguments)

from attention import backends
from attention.cache import cache_class
from checkpoint.extend import set_length
from decoding.beam import Beam
from hardware import DTYPES, choose_device, fastest_dtype
from serving.answer_file import answer_file
from serving.assistant import Assistant, load_assistant, open_draft
from serving.single import answer_scored, demonstrate
from serving.terminal import chat, print_pieces
from training.checksums import MOST_BYTES, check_model


def main(args: Args) -> dict[str, Any]:
    """Do the one thing that the flags ask for; return its numbers."""
    check(args)
    device = choose_device(args.device)
    dtype = fastest_dtype(device, decodes=args.task != "loss") if args.dtype == "auto" else DTYPES[args.dtype]
    backends.check(args.attention, dtype, device, training=False)
    options = {"base": args.base, "raw": args.raw, "stop": args.stop, "system": args.system, "cache": args.cache}
    directory = find_model(args.model)
    check_model(directory, MOST_BYTES)
    assistant = load_assistant(directory, device, dtype, **options)
    if args.max_seq_len is not None:
        set_length(assistant.model, args.max_seq_len)
    with backends.use(args.attention):
        if args.task != "chat":
            return make_task(args.task, args).run(assistant)
        assistant = with_decoder(assistant, args)
        result = answer(assistant, args)
    if report := assistant.decoder.report():
        say(f"({report})")
    return result


def with_decoder(assistant: Assistant, args: Args) -> Assistant:
    """Return the assistant with the way to decode that the flags ask for."""
    if args.num_beams != 1:
        return dataclasses.replace(assistant, decoder=Beam(assistant.model, args.num_beams, args.length_penalty))
    if args.draft is not None:
        return dataclasses.replace(assistant, decoder=open_draft(assistant, args.draft, args.draft_tokens))
    return assistant


def answer(assistant: Assistant, args: Args) -> dict[str, Any]:
    """Answer a file, one prompt, the demo prompts, or what is typed."""
    if args.input is not None:
        return answer_file(assistant, args.input, args.output, args.sampling, args.batch_size)
    if args.logprobs is not None:
        text, tokens = answer_scored(assistant, args.prompt, args.sampling, args.logprobs)
        return {"answer": text, "tokens": tokens}
    if args.prompt is not None:
        return {"answer": print_pieces(assistant.reply(args.prompt, args.sampling))}
    if args.demo:
        return {"answers": demonstrate(assistant, args.demo_prompts, args.sampling)}
    return {"answered": chat(assistant, args.sampling)}


if __name__ == "__main__":
    advice = "a smaller --batch_size, --num_beams or --max_new_tokens, --cache int8 or --dtype bf16 takes less"
    run(main, arguments, less_memory=advice)

"""Talk to a model, let it answer a file of questions, or measure it.

python eval.py                                        a chat with the newest fine-tuned model
python eval.py --prompt '以《江上》为题写一首五言绝句'    one answer; with --logprobs 3 the probability of each token
python eval.py --input questions.jsonl                questions in any form that fine-tuning reads -> answers
python eval.py --task loss                            held-out loss in nats a token and in bits a byte
python eval.py --task poems                           200 poems under held-out titles: how many keep the form
python eval.py --task ceval --data DIR --model MODEL  a published benchmark; docs/evaluation.md lists them
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from attention import CACHES, Choice
from checkpoint.locate import DEFAULT_MODEL, find_model, read_from
from cli.args import parse, run
from cli.flags import ABOVE_0, SET, Needs, Wanted, check_flags
from cli.progress import say
from decoding.params import SamplingParams
from evaluation.registry import BENCHMARKS, EXAMS, LONG, WITH_DATA, make_task

TASKS = ("chat", *BENCHMARKS)
ITEM_FLAGS = ("data", "subjects", "limit", "against")


def forgets(cache: str) -> bool:
    """Return whether a cache cannot go back, because it forgets tokens."""
    return cache == "sinks"


OWN_PROMPTS = "the other tasks have prompts of their own; remove it"
ONE_WAY = "each is a way to decode of its own"
GREEDY = "at temperature 0 the likeliest token is taken; remove it"
NEEDS = (
    *(Needs(name, "task", ("chat",), OWN_PROMPTS) for name in ("prompt", "input", "demo")),
    Needs("prompt", "input", (None,), "either one prompt is answered or a file of them"),
    Needs("demo", "prompt", (None,), "either that is answered or the demo prompts"),
    Needs("demo", "input", (None,), "either that is answered or the demo prompts"),
    Needs("demo_prompts", "demo", (True,), "they are its prompts; add it"),
    Needs("output", "input or task", SET, "other answers are printed and not written to a file; remove it"),
    Needs(
        "output",
        "task",
        tuple(name for name in TASKS if name != "loss"),
        "loss writes MODEL.loss.json beside the model; remove it",
    ),
    *(Needs(flag, "task", WITH_DATA, "only benchmarks with items read it; remove it") for flag in ITEM_FLAGS),
    Needs("stride", "task", ("perplexity",), "only there a window slides over texts; remove it"),
    Needs("per_document", "task", ("perplexity",), "only there documents are measured; remove it"),
    Needs("cut", "task", LONG, "the other tasks leave out the beginning; remove it"),
    Needs("shots", "task", (*EXAMS, "gsm8k"), "only examinations have solved examples; remove it"),
    Needs("form", "task", EXAMS, "only questions with options have a form; remove it"),
    Needs("split", "task", EXAMS[:-1], "the data of the other tasks have no splits; remove it"),
    Needs("system", "raw", (False,), "a text without a chat template has no system message; remove it"),
    *(Needs(f"sampling.{name}", "sampling.temperature", ABOVE_0, GREEDY) for name in ("top_k", "top_p", "min_p")),
    Needs("logprobs", "prompt", SET, "it prints the tokens of one answer"),
    Needs("logprobs", "num_beams", (1,), "it prints the tokens of a sampled or greedy answer"),
    Needs("logprobs", "draft", (None,), "it needs one pass of the model for each token"),
    Needs("draft_tokens", "draft", SET, "it is the number of tokens that a draft guesses"),
    Needs("length_penalty", "num_beams", Wanted(lambda value, _: value > 1, "above 1"), "it compares the beams"),
    Needs("num_beams", "draft", (None,), ONE_WAY),
    Needs("num_beams", "prompt or input", SET, "a chat shows its answers token by token"),
    Needs("num_beams", "sampling.temperature", (0,), "beam search looks for the likeliest answer and draws nothing"),
    Needs("num_beams", "sampling.repetition_penalty", (1,), "beam search compares the model's own probabilities"),
    Needs("draft", "task", ("chat",), "measurements are made in batches; remove it"),
    Needs("draft", "input", (None,), "it speeds up single answers, and a file is answered in batches"),
    Needs("cache", "draft", (None,), "it forgets tokens to which a wrong guess has to go back", forgets),
    Needs("cache", "num_beams", (1,), "it forgets tokens to which another beam has to go back", forgets),
    Needs("batch_size", "input or task", SET, "other answers come one by one; remove it"),
    # run.sh gives the flags of one call to every measurement, and its presets have them for all calls
    *(
        Needs(name, "task", ("loss", "poems"), "only these read it; remove it", only_named=True)
        for name in ("heldout", "sft_heldout", "n_poems")
    ),
    *(
        Needs(name, "task", tuple(BENCHMARKS), "only measurements read it; remove it", only_named=True)
        for name in ("seq_len", "raw_dir")
    ),
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
    the right form; the others: published benchmarks whose data lie at --data (docs/evaluation.md), and choices: your
    own questions with options"""
    prompt: str | None = None
    """answer this and exit"""
    input: Path | None = None
    """answer every record of a file (jsonl, json, csv, parquet): questions in any form that fine-tuning reads"""
    output: Path | None = None
    """file for the answers (default: beside the input) or for the report of a task (default: beside the model)"""
    system: str = ""
    """system message before every conversation"""
    raw: bool = False
    """continue the text itself, without a chat template; always so for a model that has none"""
    demo: bool = False
    """answer the demo prompts, print where the files of the run lie, and exit"""
    demo_prompts: tuple[str, ...] = ()
    """prompts of --demo; without them those of examples.txt beside the model, which its data suggest"""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    """texts that end an answer; they are not part of it"""
    logprobs: int | None = None
    """after the answer to --prompt, print the log-probability of each token and this many likeliest tokens beside it"""
    num_beams: Annotated[int, (1, 1000)] = 1
    """above 1: beam search for the likeliest answer with this many beams; needs --temperature 0"""
    length_penalty: Annotated[float, (-100, 100)] = 1.0
    """beams are compared by log-probability / tokens^length_penalty: above 0 favours long answers, below 0 short"""
    cache: Literal[CACHES] = "static"  # type: ignore[valid-type]
    """key-value cache. int8: a quarter of float32's memory; sinks: attention sinks (StreamingLLM) for endless text; the
    first and the last tokens are kept, those between are forgotten"""
    draft: str | None = None
    """speculative decoding: directory of a smaller model with the same tokenizer, or "lookup" (prompt lookup decoding);
    the same output at temperature 0, in less time"""
    draft_tokens: Annotated[int, (1, 1000)] = 4
    """number of tokens that --draft guesses ahead"""
    batch_size: Annotated[int, (1, 1000000)] = 50
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
    data: Path | None = None
    """directory or file with the data of a benchmark, in its published layout"""
    subjects: tuple[str, ...] = ()
    """subjects of a benchmark; default: all that have a file"""
    shots: int | None = None
    """number of solved examples before a question; None: as published (5 for examinations)"""
    split: str | None = None
    """part of an examination: dev, val or test; None: val for ceval, test for the others"""
    form: Literal["letters", "answers"] = "letters"
    """letters: the options stand in the prompt and the model names a letter; answers: they do not, and the model says
    the whole answer"""
    cut: Literal["middle", "left"] = "middle"
    """part that is cut from a prompt which is longer than the model's window. middle: as LongBench is published; left:
    the beginning, as in lm-evaluation-harness"""
    limit: int | None = None
    """number of items of each subject; None: all"""
    stride: int | None = None
    """tokens by which the window of --task perplexity moves; None: half the model's context"""
    per_document: Path | None = None
    """JSON lines file of --task perplexity: loss and bits per byte of each document, the highest loss first"""
    against: Path | None = None
    """another model: answer the same items, and print the difference with the interval of paired items"""
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
        for name, least in (("limit", 1), ("shots", 0), ("stride", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name} should be at least {least}, found {value}")
        for name in ("output", "per_document"):  # before the model is loaded, and hours are spent
            if (path := getattr(self, name)) is not None and not path.parent.is_dir():
                raise ValueError(f"--{name} {path}: {path.parent} is no directory; make it, or choose another place")
        check_flags(self, NEEDS)


def announce(args: Args) -> None:
    """Write at once, to a person who waits at a terminal, that the model is being loaded."""
    waiting = args.prompt is not None or args.demo or sys.stdin.isatty()
    if args.task == "chat" and args.input is None and waiting and sys.stderr.isatty():
        say(f"loading {args.model}")


if __name__ == "__main__":
    arguments = parse(Args, "eval")  # before torch is loaded: --help and mistakes are answered at once
    announce(arguments)

from attention import backends
from checkpoint.extend import set_length
from decoding.beam import Beam
from evaluation.benchmark import compare_models
from hardware import DTYPES, choose_device, fastest_dtype
from serving.answer_file import answer_file
from serving.assistant import Assistant, load_assistant, open_draft
from serving.single import answer_scored, demonstrate
from serving.terminal import chat, print_pieces, read_examples
from training.checksums import MOST_BYTES, check_models


def main(args: Args) -> dict[str, Any]:
    """Do the one thing that the flags ask for; return its numbers."""
    task = make_task(args.task, args) if args.task != "chat" else None  # before a large model is loaded
    device = choose_device(args.device)
    dtype = fastest_dtype(device, decodes=args.task != "loss") if args.dtype == "auto" else DTYPES[args.dtype]
    backends.check(args.attention, dtype, device, training=False)
    options = {"base": args.base, "raw": args.raw, "stop": args.stop, "system": args.system, "cache": args.cache}

    def load(directory: Path, **options: Any) -> Assistant:
        directory = find_model(directory)
        check_models(read_from(directory, options.get("base")), MOST_BYTES)
        assistant = load_assistant(directory, device, dtype, **options)
        if args.max_seq_len is not None:
            set_length(assistant.model, args.max_seq_len)
        return assistant

    with backends.use(args.attention):
        if args.against is not None:
            return compare_models(task, (load(args.model, **options), load(args.against, raw=args.raw)))
        assistant = load(args.model, **options)
        if task is not None:
            return task.run(assistant)
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
        if args.draft != "lookup":
            check_models(read_from(find_model(Path(args.draft))), MOST_BYTES)
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
        prompts = args.demo_prompts or read_examples(assistant)
        return {"answers": demonstrate(assistant, prompts, args.sampling)}
    return {"answered": chat(assistant, args.sampling)}


if __name__ == "__main__":
    advice = "a smaller --batch_size, --num_beams or --max_new_tokens, --cache int8 or --dtype bf16 takes less"
    run(main, arguments, less_memory=advice)

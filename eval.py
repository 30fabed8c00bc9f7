"""Talk to a model, let it answer a file of questions, or measure it.

python eval.py                                        a chat with the newest fine-tuned model
python eval.py --prompt '以《江上》为题写一首五言绝句'    one answer; with --logprobs 3 how likely each token was
python eval.py --input questions.jsonl                {"prompt": ...} or {"messages": [...]} a line -> answers
python eval.py --task loss                            held-out loss in nats a token and in bits a byte
python eval.py --task poems                           200 poems under held-out titles, and how many keep the form
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attention import Choice
from checkpoint.locate import DEFAULT_MODEL, find_model
from cli.args import parse, run
from cli.progress import tell, track
from decoding.params import SamplingParams


@dataclass(frozen=True)
class Args:
    """Talk to a model, let it answer a file of questions, or measure it."""

    model: Path = DEFAULT_MODEL
    """a model or adapter directory, or a run's (then its best); if the default is missing: the newest below out/"""
    base: Path | None = None
    """of an adapter: the directory of the model it belongs to; None: the one that adapter_config.json names"""
    task: Literal["chat", "loss", "poems"] = "chat"
    """chat: answer (interactively, --prompt, --input, --demo); loss: on held-out data; poems: count the well-formed"""
    prompt: str | None = None
    """answer this and leave"""
    input: Path | None = None
    """answer every record of a file (jsonl, json, csv, parquet) with a "prompt" or "messages" """
    output: Path | None = None
    """where answers (default: beside the input) or the report on poems (default: beside the model) go"""
    system: str = ""
    """a system message before every conversation"""
    raw: bool = False
    """continue the text itself, without chat markers; always so for a model without a chat template"""
    demo: bool = False
    """answer the demo prompts, say where everything lies, and leave"""
    demo_prompts: tuple[str, ...] = (
        "以《江上》为题写一首五言绝句",
        "写一首李白风格的七言律诗",
        "接下一句：床前明月光",
    )
    """what --demo asks"""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    """texts at which an answer ends; they are not part of it"""
    logprobs: int | None = None
    """after the answer to --prompt, the log-probability of its tokens and this many likeliest ones in their places"""
    num_beams: int = 1
    """above 1: search for the likeliest answer, following so many at once; wants --temperature 0"""
    length_penalty: float = 1.0
    """beams are compared by log-probability / tokens^this: above 0 favours long answers, below 0 short ones"""
    cache: Literal["static", "int8", "sinks"] = "static"
    """of keys and values; int8: a quarter of the memory; sinks: a text may go on for ever, its middle is forgotten"""
    draft: str | None = None
    """answer faster by speculative decoding: the directory of a smaller model with the same tokenizer, or "lookup" """
    draft_tokens: int = 4
    """tokens that are guessed ahead with --draft"""
    batch_size: int = 50
    """answers, or rows of held-out data, at a time"""
    heldout: Path = Path("data/tiny/heldout.bin")
    """token bin for --task loss"""
    sft_heldout: Path = Path("data/tiny/sft_heldout.jsonl")
    """conversations for --task loss, when the model is one to chat with"""
    seq_len: int = 128
    """tokens of a row in --task loss; cut to what the model takes"""
    n_poems: int = 200
    """how many poems --task poems asks for"""
    raw_dir: Path = Path("data/raw")
    """where --task poems finds (or fetches) the poems and the rhyme book"""
    device: str = "auto"
    """auto: cuda, else mps, else cpu"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of parameters and arithmetic; auto: bf16 where it is the faster one (a GPU, or --task loss on some CPUs)"""
    attention: Choice = "auto"
    """what computes attention; auto: the fastest that can do it here"""


if __name__ == "__main__":
    arguments = parse(Args, "eval")  # before torch is loaded: --help and mistakes are answered at once

from attention import backends
from bins.token_bin import TokenBin
from chat.conversations import file_conversations
from chat.messages import check_messages
from chat.samples import encode_samples
from corpora import BadRecord
from corpora.files import bad, records
from corpora.poems import load_poems
from dataset import PretrainData
from dataset_sft import SFTData
from decoding.beam import BeamParams, beam_search
from decoding.generate import Token, check_prompts, generate_in_batches, generate_scored
from distributed.backend import make_backend
from evaluation import poems
from hardware import DTYPES, fastest_dtype
from serving.assistant import Assistant, load_assistant, speculator
from serving.session import ChatSession
from serving.streaming import text_pieces
from serving.terminal import converse, say
from tokenizer import Tokenizer
from training.heldout import evaluate


def main(args: Args) -> dict[str, Any]:
    """Do the one thing the flags ask for; returns its numbers."""
    check(args)
    device = make_backend("single", args.device).device
    dtype = fastest_dtype(device, decodes=args.task != "loss") if args.dtype == "auto" else DTYPES[args.dtype]
    backends.check(args.attention, dtype, device, training=False)
    given = (find_model(args.model), device, dtype, args.system, args.raw, args.stop, args.cache, args.base)
    speaker = load_assistant(*given)
    with backends.use(args.attention):
        return do(speaker, args)


def do(speaker: Assistant, args: Args) -> dict[str, Any]:
    """The task, with a model that is loaded."""
    if args.task == "loss":
        return measure_loss(speaker, args)
    if args.task == "poems":
        return measure_poems(speaker, args)
    if args.input is not None:
        return answer_file(speaker, args)
    if args.draft is None:
        return answer(speaker, args)
    guesser = speculator(speaker, args.draft, args.draft_tokens)
    speaker.stream = guesser.stream
    answered = answer(speaker, args)
    tell(f"({guesser.tally})")
    return answered | {"tally": guesser.tally}


def check(args: Args) -> None:
    """Refuse flags that contradict each other, before anything is loaded."""
    if args.prompt is not None and args.input is not None:
        raise ValueError("--prompt and --input exclude each other; give one of them")
    ways = {
        "--num_beams": args.num_beams != 1,
        "--draft": args.draft is not None,
        "--logprobs": args.logprobs is not None,
    }
    if sum(ways.values()) > 1:
        raise ValueError(f"{' and '.join(way for way, wanted in ways.items() if wanted)} exclude each other; give one")
    if ways["--logprobs"] and args.logprobs < 0:
        raise ValueError(f"--logprobs should be 0 or more, found {args.logprobs}")
    if ways["--logprobs"] and args.prompt is None:
        raise ValueError("--logprobs shows the tokens of one answer; give --prompt too")
    if ways["--draft"] and args.input is not None:
        raise ValueError("--draft makes single answers faster, and --input is answered in batches; leave --draft out")
    if args.cache == "sinks" and (ways["--draft"] or ways["--num_beams"]):
        raise ValueError("--cache sinks forgets, and --draft and --num_beams go back to earlier tokens; leave one out")
    if ways["--num_beams"]:
        if args.prompt is None and args.input is None:
            raise ValueError("--num_beams answers --prompt or --input; a chat shows its answers as they come")
        if args.sampling.temperature != 0 or args.sampling.repetition_penalty != 1:
            raise ValueError(
                "--num_beams searches for the model's likeliest answer and draws nothing; "
                "give --temperature 0 and leave --repetition_penalty at 1"
            )


# ---- answers


def answer(speaker: Assistant, args: Args) -> dict[str, Any]:
    """What is asked at the command line or typed."""
    if args.prompt is None:
        return demo(speaker, args) if args.demo else chat(speaker, args)
    ids = speaker.encode([{"role": "user", "content": args.prompt}])
    if args.num_beams != 1:
        return {"answer": say([speaker.text(search(speaker, ids, args))])}
    if args.logprobs is None:
        return {"answer": say(speaker.reply(args.prompt, args.sampling))}
    given = (speaker.stop_ids, None, args.cache, speaker.stop.ended, args.logprobs)
    tokens = generate_scored(speaker.model, [ids], args.sampling, *given)[0]
    said = say([speaker.text([token.id for token in tokens])])
    print(token_table(tokens, speaker.tokenizer))
    return {"answer": said, "tokens": tokens}


def search(speaker: Assistant, prompt: list[int], args: Args) -> list[int]:
    """The best answer that beam search finds."""
    params = BeamParams(args.num_beams, args.length_penalty, max_new_tokens=args.sampling.max_new_tokens)
    return beam_search(speaker.model, prompt, params, speaker.stop_ids, args.cache, speaker.stop.ended)[0].ids


def token_table(tokens: list[Token], tokenizer: Tokenizer) -> str:
    """A line a token: its log-probability under the model itself, before temperature, and the likeliest ones."""

    def shown(i: int, logprob: float) -> str:
        piece = tokenizer.id_to_bytes(i)
        text = piece.decode("utf8", errors="ignore") or tokenizer.decode([i], skip_special=False)
        whole = text.encode() == piece or not piece  # else it is part of a character
        return f"{(text if whole else piece)!r} {math.exp(logprob):.1%}"

    lines = [f"{t.logprob:9.4f}  {shown(t.id, t.logprob):24}" + ", ".join(shown(*top) for top in t.top) for t in tokens]
    total = sum(token.logprob for token in tokens)
    return "\n".join([f"{'log p':>9}  token", *(line.rstrip() for line in lines), f"{total:9.4f}  together"])


def chat(speaker: Assistant, args: Args) -> dict[str, Any]:
    """Questions from standard input, answers as they come."""
    if sys.stdin.isatty():
        how = "it continues what you type" if speaker.template is None else "ask it something"
        size = speaker.model.n_parameters() / 1e6
        print(f"{speaker.directory}, {size:.2f} M parameters: {how}; /help, /quit")
    if speaker.template is None:
        return {"answered": converse(speaker.reply, lambda: None, args.sampling)}
    given = (speaker.model, speaker.tokenizer, speaker.template, args.system)
    session = ChatSession(*given, args.cache, speaker.stop, speaker.stream)

    def ask(question: str, params: SamplingParams) -> Generator[str, None, None]:
        before = session.forgotten
        with contextlib.closing(session.ask(question, params)) as ids:
            if gone := session.forgotten - before:
                tell(f"(the context is full; oldest turns forgotten: {gone})")
            yield from text_pieces(speaker.tokenizer, ids, speaker.stop)

    return {"answered": converse(ask, session.reset, args.sampling)}


def demo(speaker: Assistant, args: Args) -> dict[str, Any]:
    """A few exchanges, and where everything lies."""
    answers = []
    for question in args.demo_prompts:
        print(f"> {question}")
        answers.append(say(speaker.reply(question, args.sampling)))
        print()
    run = speaker.directory.parent
    places = {"model": speaker.directory.resolve(), "measures": run / "metrics.jsonl", "loss picture": run / "loss.png"}
    places |= {"settings": run / "config.yaml", "poems it wrote": run / "poems.txt"}
    for name, path in places.items():
        if path.exists():
            print(f"{name:15} {path}")
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    print(f"{'to chat':15} {python} eval.py --model {speaker.directory}")
    return {"answers": answers}


def answer_file(speaker: Assistant, args: Args) -> dict[str, Any]:
    """Every record of --input with an "answer" beside its own fields; broken ones are kept aside with their places."""
    output = args.output or args.input.with_suffix(".answers.jsonl")
    if not args.input.is_file():
        raise FileNotFoundError(f"--input {args.input} is not a file of questions")
    if output.resolve() == args.input.resolve():
        raise ValueError(f"--output {output} would overwrite the questions; name another file")
    questions, prompts, broken = read_questions(speaker, args.input)
    if args.num_beams != 1:
        answers = (search(speaker, prompt, args) for prompt in track(prompts, "searching", "answers", len(prompts)))
    else:
        given = (args.sampling, speaker.stop_ids, args.batch_size, args.cache, speaker.stop.ended)
        answers = generate_in_batches(speaker.model, prompts, *given)
    with output.open("w", encoding="utf8", errors="backslashreplace") as file:  # half a surrogate pair stays its escape
        for question, ids in zip(questions, answers):
            row = {**question, "answer": speaker.text(ids)}
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    print(f"{len(questions)} answers in {output}")
    if broken:
        aside = output.with_suffix(".bad.jsonl")
        lines = (json.dumps(vars(record), ensure_ascii=False) + "\n" for record in broken)
        aside.write_text("".join(lines), encoding="utf8")
        places = ", ".join(record.where for record in broken[:3]) + ", ..." * (len(broken) > 3)
        tell(f"{len(broken)} records could not be read ({places}); they are kept in {aside}")
    return {"answers": len(questions), "bad": len(broken), "output": str(output)}


def read_questions(speaker: Assistant, path: Path) -> tuple[list[dict], list[list[int]], list[BadRecord]]:
    """The records of a file that can be answered, their prompts, and those that cannot."""
    questions, prompts, broken = [], [], []
    for record in records(path):
        if isinstance(record, BadRecord):
            broken.append(record)
            continue
        try:
            prompt = speaker.encode(messages_of(record.value))
            check_prompts(speaker.model, [prompt], speaker.longest)
        except ValueError as error:
            broken.append(bad(record.where, str(error), json.dumps(record.value, ensure_ascii=False, default=str)))
            continue
        questions.append(record.value)
        prompts.append(prompt)
    if not questions:
        first = f"; the first record, {broken[0].where}: {broken[0].reason}" if broken else ", the file is empty"
        raise ValueError(f'{path} holds no prompts: expected records with "prompt" or "messages"{first}')
    return questions, prompts, broken


def messages_of(record: Any) -> list[dict]:
    """The conversation in a record that is to be answered; the answer it may end with is the model's to write."""
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return [{"role": "user", "content": record["prompt"]}]
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected an object with a text as "prompt" or a list as "messages"')
    check_messages(messages)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


# ---- measures


def measure_loss(speaker: Assistant, args: Args) -> dict[str, Any]:
    """Loss on the held-out token bin and, of a model to chat with, on the answers in held-out conversations."""
    tokenizer, seq_len = speaker.tokenizer, min(args.seq_len, speaker.model.args.max_seq_len)
    sources = {}
    if args.heldout.is_file():
        tokens = TokenBin(args.heldout)
        tokens.check(tokenizer.sha256(), tokenizer.vocab_size)
        sources[args.heldout] = PretrainData([tokens], seq_len, args.batch_size, seed=0, shuffle=False)
    if speaker.template is not None and args.sft_heldout.is_file():
        samples = encode_samples(file_conversations(args.sft_heldout, []), speaker.template, seq_len)
        sources[args.sft_heldout] = SFTData(samples, seq_len, args.batch_size, seed=0, shuffle=False)
    if not sources:
        raise FileNotFoundError(f"neither {args.heldout} nor {args.sft_heldout} exists; data_process.py makes them")
    measures = {}
    for path, source in sources.items():
        tell(f"{path}: {source.steps_per_epoch} batches of {args.batch_size} x {seq_len} tokens ...")
        measures[path.stem] = found = evaluate(speaker.model, source, tokenizer.token_bytes())
        print(f"{path}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items()))
    return measures


def measure_poems(speaker: Assistant, args: Args) -> dict[str, Any]:
    """Ask for poems, count how many keep the form, and write all of them down."""
    if speaker.template is None:
        raise ValueError(f"{speaker.directory} has no chat template (or --raw is true), so it cannot be asked")
    corpus = list(load_poems(args.raw_dir))
    try:
        book = poems.rhyme_book(args.raw_dir)
    except OSError as error:
        book = None
        tell(f"rhyme is not measured: {error}")
    answers = poems.ask_for_poems(
        *(speaker.model, speaker.tokenizer, speaker.template, args.sampling, corpus, args.n_poems, args.batch_size)
    )
    shares = poems.measure(answers, corpus, book)
    output = args.output or speaker.directory.parent / "poems.json"
    about = {"model_directory": str(speaker.directory.resolve()), "sampling": vars(args.sampling)}
    poems.write(output, answers, shares, about)
    for answer in [a for a in answers if a.exact][:4]:
        print(f"> {answer.question}\n{answer.text}\n")
    print(f"{poems.table(shares)}\n\nall of them: {output.with_suffix('.txt')}, {output}")
    return shares["model"]


if __name__ == "__main__":
    run(main, arguments)

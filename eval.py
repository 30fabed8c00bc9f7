"""Talk to a model, let it answer a file of questions, or measure it.

python eval.py                                        a chat with the newest fine-tuned model
python eval.py --prompt '以《江上》为题写一首五言绝句'    one answer
python eval.py --input questions.jsonl                {"prompt": ...} or {"messages": [...]} a line -> answers
python eval.py --task loss                            held-out loss in nats a token and in bits a byte
python eval.py --task poems                           200 poems under held-out titles, and how many keep the form
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import config
import poem_eval
from bins import TokenBin
from checkpoint import load_model
from console import converse, say, tell
from conversations import file_conversations
from corpora import BadRecord
from corpora.files import bad, records
from corpora.poems import load_poems
from dataset import PretrainData
from dataset_sft import encode_samples
from distributed import make_backend
from evaluation import evaluate
from generate import ChatSession, SamplingParams, check_prompts, generate_in_batches, stream, text_pieces
from hardware import has_bfloat16
from model import Transformer
from packing import SFTData
from tokenizer import MARKERS, ChatTemplate, Tokenizer, check_messages, load_template, load_tokenizer
from trainer import DTYPES


@dataclass(frozen=True)
class Args:
    """Talk to a model, let it answer a file of questions, or measure it."""

    model: Path = Path("out/tiny/sft/best")
    """the model directory, or a run directory (then its best); if the default is missing: the newest below out/"""
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
    """continue the text itself, without chat markers; always so for a model without a chat template of ours"""
    demo: bool = False
    """answer the demo prompts, say where everything lies, and leave"""
    demo_prompts: tuple[str, ...] = (
        "以《江上》为题写一首五言绝句",
        "写一首李白风格的七言律诗",
        "接下一句：床前明月光",
    )
    """what --demo asks"""
    sampling: SamplingParams = field(default_factory=SamplingParams)
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


def main(args: Args) -> dict[str, Any]:
    """Do the one thing the flags ask for; returns its numbers."""
    if args.prompt is not None and args.input is not None:
        raise ValueError("--prompt and --input exclude each other; give one of them")
    speaker = load(args)
    if args.task == "loss":
        return measure_loss(speaker, args)
    if args.task == "poems":
        return measure_poems(speaker, args)
    if args.input is not None:
        return answer_file(speaker, args)
    if args.prompt is not None:
        return {"answer": say(speaker.reply(args.prompt, args.sampling))}
    return demo(speaker, args) if args.demo else chat(speaker, args)


# ---- the model


@dataclass
class Speaker:
    """A loaded model and what turns its ids into text; `template` is None when texts are only continued."""

    directory: Path
    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate | None
    system: str

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

    def text(self, ids: list[int]) -> str:
        """The text of an answer; that of a continuation keeps the space it may begin with."""
        return "".join(text_pieces(self.tokenizer, ids)) if self.template is None else self.tokenizer.decode(ids)

    def reply(self, question: str, params: SamplingParams) -> Iterator[str]:
        """The answer to one question, or what follows a text, piece by piece."""
        ids = self.encode([{"role": "user", "content": question}])
        return text_pieces(self.tokenizer, stream(self.model, ids, params, self.stop_ids))


def load(args: Args) -> Speaker:
    """The model to evaluate, on its device."""
    directory = find_model(args.model)
    tokenizer = load_tokenizer(directory)
    device = make_backend("single", args.device).device
    dtype = fastest_dtype(device, args.task) if args.dtype == "auto" else DTYPES[args.dtype]
    model = load_model(directory, device, dtype)
    if tokenizer.vocab_size > model.args.vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} ids, the model {model.args.vocab_size}: "
            "they do not belong together"
        )
    return Speaker(directory, model.eval(), tokenizer, None if args.raw else own_template(tokenizer), args.system)


def fastest_dtype(device: torch.device, task: str) -> torch.dtype:
    """bfloat16 where the hardware has it, except for decoding on a CPU: single tokens take four times as long in it."""
    decodes_on_cpu = device.type == "cpu" and task != "loss"
    return torch.bfloat16 if has_bfloat16(device) and not decodes_on_cpu else torch.float32


def find_model(path: Path) -> Path:
    """`path`, or the best in it; if `path` is the default and missing, the newest model directory below out/."""
    for directory in (path, path / "best", path / "last"):
        if (directory / "config.json").is_file():
            return directory
    if path.name == "best" and (path.with_name("last") / "config.json").is_file():
        return path.with_name("last")  # of a run that was not evaluated
    advice = "run `bash run.sh` to train one, or give --model DIR"
    if path != Args.model:
        what = "is no model directory (it has no config.json)" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; {advice}")
    # A directory that begins with a dot is one that is still being written.
    found = [p for p in Path("out").rglob("config.json") if not any(part.startswith(".") for part in p.parts)]
    if not found:
        raise FileNotFoundError(f"there is no model at {path} and none below out/; {advice}")
    newest = max(found, key=lambda p: p.stat().st_mtime).parent
    tell(f"there is no model at {path}; using the newest, {newest}")
    return newest


def has_markers(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary is one of ours."""
    return all(marker in tokenizer.special for marker in MARKERS)


def own_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Our chat template, if that is the one this tokenizer was saved with; a foreign one cannot be rendered here."""
    try:
        template = load_template(tokenizer)
    except ValueError:
        return None
    return template if has_markers(tokenizer) or tokenizer.chat_template == template.jinja() else None


# ---- answers


def chat(speaker: Speaker, args: Args) -> dict[str, Any]:
    """Questions from standard input, answers as they come."""
    if sys.stdin.isatty():
        how = "it continues what you type" if speaker.template is None else "ask it something"
        size = speaker.model.n_parameters() / 1e6
        print(f"{speaker.directory}, {size:.2f} M parameters: {how}; /help, /quit")
    if speaker.template is None:
        return {"answered": converse(speaker.reply, lambda: None, args.sampling)}
    session = ChatSession(speaker.model, speaker.tokenizer, speaker.template, args.system)

    def ask(question: str, params: SamplingParams) -> Generator[str, None, None]:
        before = session.forgotten
        with contextlib.closing(session.ask(question, params)) as ids:
            if gone := session.forgotten - before:
                tell(f"(the context is full; oldest turns forgotten: {gone})")
            yield from text_pieces(speaker.tokenizer, ids)

    return {"answered": converse(ask, session.reset, args.sampling)}


def demo(speaker: Speaker, args: Args) -> dict[str, Any]:
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


def answer_file(speaker: Speaker, args: Args) -> dict[str, Any]:
    """Every record of --input with an "answer" beside its own fields; broken ones are kept aside with their places."""
    output = args.output or args.input.with_suffix(".answers.jsonl")
    if not args.input.is_file():
        raise FileNotFoundError(f"--input {args.input} is not a file of questions")
    if output.resolve() == args.input.resolve():
        raise ValueError(f"--output {output} would overwrite the questions; name another file")
    questions, prompts, broken = read_questions(speaker, args.input)
    answers = generate_in_batches(speaker.model, prompts, args.sampling, speaker.stop_ids, args.batch_size)
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


def read_questions(speaker: Speaker, path: Path) -> tuple[list[dict], list[list[int]], list[BadRecord]]:
    """The records of a file that can be answered, their prompts, and those that cannot."""
    questions, prompts, broken = [], [], []
    for record in records(path):
        if isinstance(record, BadRecord):
            broken.append(record)
            continue
        try:
            prompt = speaker.encode(messages_of(record.value))
            check_prompts(speaker.model, [prompt])
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


def measure_loss(speaker: Speaker, args: Args) -> dict[str, Any]:
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


def measure_poems(speaker: Speaker, args: Args) -> dict[str, Any]:
    """Ask for poems, count how many keep the form, and write all of them down."""
    if speaker.template is None:
        raise ValueError(f"{speaker.directory} has no chat template of ours (or --raw is true), so it cannot be asked")
    poems = list(load_poems(args.raw_dir))
    try:
        book = poem_eval.rhyme_book(args.raw_dir)
    except OSError as error:
        book = None
        tell(f"rhyme is not measured: {error}")
    answers = poem_eval.ask_for_poems(
        *(speaker.model, speaker.tokenizer, speaker.template, args.sampling, poems, args.n_poems, args.batch_size)
    )
    shares = poem_eval.measure(answers, poems, book)
    output = args.output or speaker.directory.parent / "poems.json"
    about = {"model_directory": str(speaker.directory.resolve()), "sampling": vars(args.sampling)}
    poem_eval.write(output, answers, shares, about)
    for answer in [a for a in answers if a.exact][:4]:
        print(f"> {answer.question}\n{answer.text}\n")
    print(f"{poem_eval.table(shares)}\n\nall of them: {output.with_suffix('.txt')}, {output}")
    return shares["model"]


if __name__ == "__main__":
    config.run(main, Args, "eval")

"""Look at a machine, a model, data, conversations or a run, and say what is wrong and what to do.

python doctor.py                                        this machine
python doctor.py --model out/tiny/sft/best --data data/tiny --chats data/tiny/sft_train.jsonl
python doctor.py --run out/tiny/pretrain                checkpoints and log of a run
python doctor.py --model DIR --text my_texts.txt        does its tokenizer suit my texts?

A run that has not begun is looked at by its own command: python pretrain.py ... --check True.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from cli.args import parse, run
from cli.flags import SET, Needs, check_flags

ROWS = "rows are of data or of conversations; name some, or remove it"
NEEDS = (
    Needs("heldout", "chats", SET, "it is compared with the conversations that are trained"),
    Needs("template", "chats or model", SET, "there is nothing to render; remove it"),
    Needs("text", "model or data", SET, "they have the tokenizer"),
    Needs("chats", "model or data", SET, "they have the tokenizer"),
    Needs("seq_len", "data or chats", SET, ROWS),
)


@dataclass(frozen=True)
class Args:
    """Look at a machine, and at a model, data, conversations or a run where they are named; exit status 1 for a fault.

    Nothing is changed.
    """

    model: Path | None = None
    """directory of a model, an adapter or a run (then its best)"""
    data: Path | None = None
    """directory that data_process.py wrote: train*.bin, heldout.bin, tokenizer/"""
    chats: tuple[Path, ...] = ()
    """files of conversations to fine-tune on, in any form that fine_tuning.py reads"""
    heldout: Path | None = None
    """held-out conversations"""
    text: Path | None = None
    """texts that the tokenizer should suit: txt, json, jsonl, csv, parquet"""
    run: Path | None = None
    """directory of a run: are its checkpoints whole, and what does its log say?"""
    template: str = "auto"
    """chat template, as --data.template of fine_tuning.py"""
    seq_len: Annotated[int, (2, 1000000)] = 256
    """tokens of a row"""
    device: str = "auto"
    """cpu, cuda or mps, as --train.device of a training"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """dtype that a training on this machine would be given"""
    json: Path | None = None
    """file to write all checks to, as JSON"""

    def __post_init__(self) -> None:
        """Raise ValueError where a flag needs another one."""
        check_flags(self, NEEDS)


if __name__ == "__main__":
    arguments = parse(Args, "doctor")  # before torch is loaded: --help and mistakes are answered at once

from bins.token_bin import TokenBin
from chat.template import load_template
from checkpoint.locate import find_model, has_tokenizer
from checks import chats, data, runs, vocabulary, weights
from checks.check import FAULT, Check, as_json, attempt, conclude, lines
from checks.machine import machine
from corpora.files import read_files
from corpora.registry import Document
from dataset import PretrainData
from files import write_json
from hardware import choose_device
from model import Transformer
from tokenizer import Tokenizer, load_tokenizer

N_TEXTS, CHARACTERS = 200, 4000  # that the tokenizer is tried on


def main(args: Args) -> dict[str, Any]:
    """Print all checks, and return them; SystemExit with status 1 where one is a fault."""
    device = choose_device(args.device)
    found = machine(device, args.dtype)
    directory = None if args.model is None else find_model(args.model, "give the directory of a model to --model")
    model = None
    if directory is not None:
        checks, model = weights.model_directory(directory)
        found += checks
    if args.run is not None:
        found += runs.run_directory(args.run)
    if directory is not None or args.data is not None:
        found += with_tokenizer(args, directory, model)
    print(*lines(found), sep="\n", flush=True)
    if args.json is not None:
        write_json(args.json, as_json(found))
    return conclude(found)


def with_tokenizer(args: Args, directory: Path | None, model: Transformer | None) -> list[Check]:
    """Return the checks that need a tokenizer: that of the model, else that beside the data."""
    read: list[Tokenizer] = []
    places = [each for each in (directory, args.data and args.data / "tokenizer") if each is not None]
    place = next((each for each in places if has_tokenizer(each)), places[0])
    advice = "copy the tokenizer's files there, or train one with train_tokenizer.py"
    found = attempt("tokenizer", "a tokenizer that can be read", advice, lambda: read.append(load_tokenizer(place)))
    if not read:
        return found
    tokenizer = read[0]
    if model is not None:
        found += vocabulary.fits(tokenizer, model.args)
    if args.text is not None:
        documents = (each for each in read_files(args.text, "text") if isinstance(each, Document))
        found += vocabulary.suits(tokenizer, [each.text[:CHARACTERS] for each in islice(documents, N_TEXTS)])
    if args.data is not None:
        found += data.data_directory(args.data, tokenizer)
        if model is not None:
            found += attempt("loss on the text", "a loss", data.AGAIN, lambda: list(on_text(args, model, tokenizer)))
    if args.chats or (directory is not None and (args.template != "auto" or tokenizer.chat_template)):
        found += chats.template_of(tokenizer, args.template, directory)
    if args.chats and found[-1].level != FAULT:
        template = load_template(tokenizer, args.template)
        found += chats.conversations(args.chats, args.heldout, template, args.seq_len)
    return found


def on_text(args: Args, model: Transformer, tokenizer: Tokenizer) -> Iterator[Check]:
    """Yield the checks of a model on the held-out data of its directory, else on the trained ones."""
    heldout = args.data / "heldout.bin"
    paths = [heldout] if heldout.is_file() else sorted(args.data.glob("train*.bin"))
    seq_len = min(args.seq_len, model.args.max_seq_len)
    source = PretrainData([TokenBin(each) for each in paths[:1]], seq_len, batch_size=8, seed=0, shuffle=False)
    if int(source.batch(0).tokens.max()) < model.args.vocab_size:  # else it is told already
        yield from weights.on_text(model, source)


if __name__ == "__main__":
    run(main, arguments)

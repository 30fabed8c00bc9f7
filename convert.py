"""Convert models: merge an adapter into a model, add tokens to a model, write and read the formats of other programs;
token files likewise.

python convert.py merge --model DIR --adapter DIR --out DIR
python convert.py tokens --model DIR --add_special_tokens "<|im_start|>" "<|im_end|>" --out DIR
python convert.py export --model DIR --format gguf --dtype q8_0 --out FILE
python convert.py import SRC --out DIR
python convert.py data SRC --format megatron --out DIR
python convert.py card --model DIR --license apache-2.0 --language zh en
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from bins.exchange import TARGETS, Settings
from cli.args import parse_command, run, with_values
from cli.flags import Needs, check_flags
from formats.options import EXPORTS, ExportOptions, ImportOptions
from quant.kinds import KINDS

NEEDS = (
    Needs("double_quant", "base", ("nf4", "fp4"), "auto follows the adapter's file, the others have no such scales"),
)
EXPORT_NEEDS = (
    Needs("shards", "format", ("meta",), "the other formats have no ranks; remove it"),
    Needs("tensor_parallel", "format", ("megatron",), "the other formats have no such ranks; remove it"),
    Needs("pipeline_parallel", "format", ("megatron",), "the other formats have no stages; remove it"),
    Needs("shard_size", "format", ("huggingface",), "only that is cut by size; remove it"),
)
DATA_NEEDS = (
    Needs("tokens_per_file", "format", ("bins",), "the others have no files of a largest size; remove it"),
    Needs("chunk_tokens", "format", ("packed",), "the others have no chunks; remove it"),
)


@dataclass(frozen=True)
class Merge:
    """Add an adapter to the weights of the model it was trained on, and write a plain Hugging Face directory."""

    model: Path
    """directory of the model that the adapter belongs to"""
    adapter: Path
    """PEFT directory: adapter_config.json and adapter_model.safetensors"""
    out: Path
    """directory to write"""
    base: Literal[("auto", "full", *KINDS)] = "auto"  # type: ignore[valid-type]
    """weights that the adapter is added to. full: as they are; the others: quantized and made dense again; auto: as in
    the adapter's training, which its file states (files written by PEFT do not: full)"""
    double_quant: bool = True
    """quantize the scales of nf4 and fp4, too; with auto, the adapter's file decides"""
    untie: bool = False
    """give a head that is tied to the embedding a matrix of its own: for an adapter that trained the two apart"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """dtype of the weights that are written (the sum is computed in fp32); auto: that of --model"""

    def __post_init__(self) -> None:
        """Raise ValueError where a flag needs another one to have another value."""
        check_flags(self, NEEDS)


@dataclass(frozen=True)
class Tokens:
    """Add tokens to a model. The row of each starts as the mean of the rows of the tokens that spelled it so far."""

    model: Path
    """directory of the model"""
    out: Path
    """directory to write"""
    add_tokens: tuple[str, ...] = ()
    """pieces of text (or a file of one a line) that become tokens"""
    add_special_tokens: tuple[str, ...] = ()
    """control tokens to add, e.g. <|im_start|>. Text never turns into them; only a chat template inserts them"""
    vocab_multiple_of: Annotated[int, (1, 1048576)] = 1
    """round the vocabulary up to a multiple of this"""


@dataclass(frozen=True, kw_only=True)
class Export(ExportOptions):
    """Write a model in the format of another program, or as a directory with another dtype or other files."""

    model: Path
    """Hugging Face directory of the model; for --format gguf also an adapter"""
    format: Literal[tuple(EXPORTS)]  # type: ignore[valid-type]
    """what to write; docs/conversion.md says which programs read it, and what it cannot hold"""
    out: Path
    """file or directory to write"""
    base: Path | None = None
    """with --model an adapter: directory of the model that it belongs to; None: the one that its config names"""

    def __post_init__(self) -> None:
        """Raise ValueError for a dtype that the format does not have, or a flag that does nothing there."""
        check_flags(self, EXPORT_NEEDS)
        check_dtype(self.dtype, self.format)


def check_dtype(dtype: str, target: str) -> None:
    """Raise ValueError for a dtype that a format does not have."""
    if dtype not in ("auto", *EXPORTS[target]):
        others = f"auto or {', '.join(EXPORTS[target])}" if EXPORTS[target] else "auto"
        raise ValueError(f"--dtype {dtype} is not one of the format {target}, which has {others}")


@dataclass(frozen=True, kw_only=True)
class Import(ImportOptions):
    """Write a model of another program as a Hugging Face directory. Its format is detected from its contents."""

    first_word: ClassVar[str] = "source"

    source: Path
    """file or directory to read; it may stand without its flag behind the word import"""
    out: Path
    """directory to write"""
    tokenizer: Path | None = None
    """tokenizer of the model (directory, .model or tokenizer.json); None: the one in or beside the source"""

    def __post_init__(self) -> None:
        """Raise ValueError for a dtype that a Hugging Face directory does not have."""
        check_dtype(self.dtype, "huggingface")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Write token files in another format: ours for Megatron-LM, lit-gpt and nanoGPT, and theirs as ours."""

    first_word: ClassVar[str] = "source"

    source: Path
    """a .bin file, its name without .bin, or a directory of them: token bins of data_process.py, an indexed dataset of
    Megatron-LM, packed chunks (lit-gpt, TinyLlama, LitHFT), data of llm-lite-trainer, uint16 ids without a header
    (nanoGPT, baby-llama2). The format is detected;
    the path may stand without its flag behind the word data"""
    out: Path
    """directory to write"""
    format: Literal[TARGETS] = "bins"  # type: ignore[valid-type]
    """what to write. bins: train_*.bin, heldout.bin and tokenizer/ for pretrain.py; megatron: .bin and .idx; packed:
    chunks of lit-gpt; raw: train.bin and val.bin of nanoGPT"""
    tokenizer: Path | None = None
    """tokenizer of the ids (directory, .model or tokenizer.json), which only our bins name; None: tokenizer/ in
    the directory of the source"""
    separator: Literal["eos", "bos"] = "eos"
    """what parts the documents of a source that has no index of them: eos after each, or bos before each (TinyLlama)"""
    tokens_per_file: Annotated[int, (1, 4611686018427387904)] = Settings.tokens_per_file
    """most tokens of a training bin"""
    chunk_tokens: Annotated[int, (1, 1 << 32)] = Settings.chunk_tokens
    """tokens of a packed chunk: a multiple of the length of a row and one more"""

    def __post_init__(self) -> None:
        """Raise ValueError where a flag needs another one to have another value."""
        check_flags(self, DATA_NEEDS)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Write README.md, the model card of the Hugging Face Hub, from what the runs of a model have recorded."""

    model: Path
    """directory of the model or adapter"""
    run: Path | None = None
    """directory of the run that made it, where the model does not lie in it"""
    out: Path | None = None
    """file to write; None: README.md in --model"""
    name: str | None = None
    """name of the model on the Hub, such as owner/model; None: that of its directory"""
    license: str | None = None
    """licence of the model, such as apache-2.0; only you can say it"""
    language: tuple[str, ...] = ()
    """languages of the model by their codes, such as zh en"""
    base_model: str | None = None
    """name on the Hub of the model that this one was made from; None: as the record says"""


if __name__ == "__main__":
    # before torch is loaded: --help and mistakes are answered at once
    classes = {"merge": Merge, "tokens": Tokens, "export": Export, "import": Import, "data": Data, "card": Card}
    command, arguments = parse_command(classes, "convert", __doc__)

import torch

from bins import exchange
from bins.foreign import NAMES, find
from bins.pickled_rows import of_conversations
from checkpoint import card as model_card
from checkpoint import history, peft
from checkpoint.adapter_config import read_adapter_config
from checkpoint.directory import kept_dtype, load_adapted, load_whole_model, save_model
from checkpoint.extend import grow_vocabulary
from checkpoint.locate import find_model, find_tokenizer, is_adapter
from cli.progress import say
from corpora import CORPORA
from files import check_place, write_text, written_aside
from formats import registry
from formats.base import Checkpoint, Format, map_lines
from hardware import DTYPES
from model import Transformer
from tokenizer import load_tokenizer
from training.checksums import MOST_BYTES, check_models


def merge(args: Merge) -> dict[str, Any]:
    """Write the merged model; returns its directory."""
    adapter = find_model(args.adapter, "give --adapter the directory that holds the adapter")
    read_adapter_config(adapter)  # refuse a broken adapter before the model is loaded
    args = with_values(args, adapter=adapter, model=find_model(args.model, "give --model a model directory"))
    check_free(args.out)
    check_models((args.adapter, args.model), MOST_BYTES)
    warn_of_another_base(args)
    kind = peft.base_kind(args.adapter) if args.base == "auto" else (args.base, args.double_quant)
    model = load_adapted(args.adapter, args.model, kind, separate=args.untie)
    check_ties(model, args)
    dtype = DTYPES.get(args.dtype) or kept_dtype(args.model)
    tokenizer, stop_ids = find_tokenizer(args.adapter, args.model)
    with written_aside(args.out) as aside:
        save_model(aside, model.to(dtype), tokenizer, stop_ids)
        history.write_origin(aside, "merge", model=args.model, adapter=args.adapter)
    rounded = "" if kind[0] == "full" else f", its base in {kind[0]}"  # what --lora.base, or --base here, makes of it
    print(f"{args.adapter} is merged into {args.model}{rounded}: {args.out}", flush=True)
    return {"model": str(args.out)}


def tokens(args: Tokens) -> dict[str, Any]:
    """Write the larger model; returns its directory."""
    if not args.add_tokens and not args.add_special_tokens:
        raise ValueError("--add_tokens and --add_special_tokens are both empty: name the tokens to add")
    args = with_values(args, model=find_model(args.model, "give --model a model directory"))
    check_free(args.out)
    check_models([args.model], MOST_BYTES)
    model, (tokenizer, stop_ids) = load_whole_model(args.model), find_tokenizer(args.model)
    if tokenizer is None:
        raise FileNotFoundError(f"--model {args.model} has no tokenizer to add tokens to")
    tokenizer, changes = grow_vocabulary(
        model,
        tokenizer,
        texts=args.add_tokens,
        special=args.add_special_tokens,
        where=args.model,
        multiple_of=args.vocab_multiple_of,
    )
    with written_aside(args.out) as aside:
        save_model(aside, model.to(kept_dtype(args.model)), tokenizer, stop_ids)
        history.write_origin(aside, "tokens", model=args.model)
    print(f"{args.out}: {changes}", flush=True)
    return {"model": str(args.out)}


def export(args: Export) -> dict[str, Any]:
    """Write the model in another format; returns the path that was written."""
    args = with_values(args, model=find_model(args.model, "give --model a model directory"))
    check_models([args.model], MOST_BYTES)
    if is_adapter(args.model) and args.format in registry.ADAPTERS:
        target = registry.ADAPTERS[args.format]
        return write(target.read(args.model, args.base), target, args)
    if args.base is not None:
        raise ValueError(f"--base is for an adapter that goes to --format gguf, and --model is {args.model}: remove it")
    return write(registry.FORMATS["huggingface"].read(args.model), registry.FORMATS[args.format], args)


def import_(args: Import) -> dict[str, Any]:
    """Write the model as a Hugging Face directory; returns its path."""
    found = registry.detect(args.source)
    say(f"{args.source} is {found.title}")
    if found.asks:
        checkpoint = found.read(args.source, args)
    elif given := [*args.known(), *(["like"] if args.like else [])]:
        raise ValueError(f"--{given[0]} has no effect with {found.title}, which says so itself; remove it")
    else:
        checkpoint = found.read(args.source)
    if args.tokenizer is not None:
        checkpoint.tokenizer, checkpoint.stop_ids = find_tokenizer(args.tokenizer)
        if checkpoint.tokenizer is None:
            checkpoint.tokenizer = load_tokenizer(args.tokenizer)
    if checkpoint.tokenizer is None and checkpoint.folder is None:
        say(f"there is no tokenizer in or beside {args.source}: name it with --tokenizer")
    return write(checkpoint, registry.FORMATS["huggingface"], args)


def write(checkpoint: Checkpoint, target: Format, args: Export | Import) -> dict[str, Any]:
    """Write a checkpoint, or with --dry_run print the map of its tensors; returns the path that was written."""
    entries = target.lay_out(checkpoint, args)
    for note in checkpoint.notes:
        say(note)
    if args.dry_run:
        print(*map_lines(entries), f"{len(entries)} tensors; nothing is written", sep="\n", flush=True)
        return {"model": None}
    check_free(args.out)
    target.write(checkpoint, entries, args.out, args)
    print(f"{args.out}: {target.title} of {len(entries)} tensors, made of {checkpoint.where}", flush=True)
    return {"model": str(args.out)}


def data(args: Data) -> dict[str, Any]:
    """Write token files in another format; returns the number of tokens by file."""
    found = find(args.source)
    check_free(args.out)
    beside = (args.source if args.source.is_dir() else args.source.parent) / "tokenizer"
    path = args.tokenizer or beside
    tokenizer = load_tokenizer(path) if args.tokenizer or (found.form != "bins" and path.is_dir()) else None
    if tokenizer is None and found.form != "bins":
        raise ValueError(f"--source {args.source} is {NAMES[found.form]}, which names no tokenizer: give --tokenizer")
    vocabulary = exchange.of_tokenizer(tokenizer, path) if tokenizer else exchange.of_bins(found)
    if found.form == "bins" and tokenizer and vocabulary.sha256 != exchange.of_bins(found).sha256:
        raise ValueError(f"--source {args.source} was made with another tokenizer than --tokenizer {args.tokenizer}")
    say(f"{args.source} is {NAMES[found.form]}")
    with written_aside(args.out) as aside:
        if found.form == "lite_trainer" and of_conversations(found.groups[0].paths[0]):
            if args.format != "bins":
                raise ValueError(f"--source {args.source} has questions and answers, no documents: remove --format")
            done = exchange.write_answers(found, aside, tokenizer)
        else:
            settings = Settings(args.format, args.separator, args.tokens_per_file, args.chunk_tokens)
            done = exchange.exchange(found, aside, vocabulary, settings)
        exchange.copy_tokenizer(tokenizer, beside, aside)
    print(*(f"{args.out}/{line}" for line in exchange.lines(done)), sep="\n", flush=True)
    return {counts.files: counts.tokens for counts in done}


def card(args: Card) -> dict[str, Any]:
    """Write the model card; returns its path, and what the record lacks."""
    model = find_model(args.model, "give --model a model directory")
    out = args.out or model / "README.md"
    check_free(out)
    if args.run is not None and history.run_of(args.run) is None:
        raise FileNotFoundError(f"--run {args.run} has no config.yaml and run.json: it is no directory of a run")
    own = model_card.Own(args.name or model.name, args.license, args.language, args.base_model)
    licences = {name: corpus.licence for name, corpus in CORPORA.items()}
    stages, base = history.history(model, args.run, licences)
    text, missing = model_card.card(model, stages, base, own)
    write_text(out, text)
    for each in missing:
        say(f"not recorded: {each}")
    print(f"{out}: the card of {model}, from {len(stages)} recorded runs", flush=True)
    return {"card": str(out), "missing": missing}


def check_free(out: Path) -> None:
    """Raise ValueError where `out` exists, as nothing is overwritten; OSError where it cannot be made."""
    if out.exists():
        raise ValueError(f"--out {out} exists already: choose another, or remove it")
    check_place(out)


def warn_of_another_base(args: Merge) -> None:
    """Say so where the adapter names another model than --model; a model that is not here is known by its name only."""
    named = read_adapter_config(args.adapter).get("base_model_name_or_path")
    if not named or Path(named).resolve() == args.model.resolve():
        return
    if Path(named).exists() or Path(named).name not in args.model.resolve().parts:
        say(
            f"--adapter {args.adapter} was trained on {named}, and --model is {args.model}: what is written is right "
            "only where both hold the same weights"
        )


def check_ties(model: torch.nn.Module, args: Merge) -> None:
    """Raise ValueError where an adapter has trained one of two tied matrices: config.json says that they are one."""
    ours = isinstance(model, Transformer)
    tied = model.args.tie_embeddings if ours else model.inner.config.get_text_config().tie_word_embeddings
    head = model.lm_head if ours else model.inner.get_output_embeddings()
    if tied and head.weight is not model.embedding.weight:
        raise ValueError(
            f"--adapter {args.adapter} trains the embedding apart from the head, and in --model {args.model} they are "
            "tied: add --untie True, which gives each a matrix of its own"
        )


COMMANDS = {
    "merge": (merge, Merge),
    "tokens": (tokens, Tokens),
    "export": (export, Export),
    "import": (import_, Import),
    "data": (data, Data),
    "card": (card, Card),
}


if __name__ == "__main__":
    run(COMMANDS[command][0], arguments, less_memory="the model is computed in float32: use a machine with more")

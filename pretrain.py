"""Pretrain a LLaMA2 model on token bins, from scratch or from a checkpoint.

python pretrain.py --config configs/tiny.yaml
torchrun --nproc_per_node 2 pretrain.py --config configs/tiny.yaml --train.backend ddp
python pretrain.py --init_from DIR --data.dir DATA --rope.type yarn --model.max_seq_len 4096 --data.seq_len 4096
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cli.args import parse, run, with_values
from cli.flags import SET, Needs, check_flags
from cli.memory import check_memory
from cli.progress import say
from cli.record import file_sha256, record_training, to_plain
from model_args import NewModelArgs, RopeArgs
from optim.args import OptimArgs
from quant.kinds import BITNETS
from training.args import NEEDS as TRAINING_NEEDS
from training.args import TrainArgs

OF_CHECKPOINT = "it changes a model that there is; name that one, or remove it"
UNMEASURED = (
    "no held-out loss will tell whether the model learns or only memorizes. Make the data anew with data_process.py "
    "and a larger --held_out (its last lines name one), or a smaller --part_chars if the text is one long document"
)
DIALLED = (
    *("model.dim", "model.n_layers", "model.n_heads", "model.n_kv_heads", "model.head_dim", "model.hidden_dim"),
    *("optim.lr", "optim.muon_lr", "optim.warmup_steps", "data.batch_size", "train.max_steps", "train.epochs"),
)
MIXED = "a mixture takes all bins of its directories, in its shares; remove one of the two"
WIDTH = "a checkpoint has its width; remove it"
# fields that change a model that there is
CHANGES = ("rope", "add_tokens", "add_special_tokens", "vocab_multiple_of", "bitnet", "qat_bits", "qat_group_size")
NEEDS = (
    *TRAINING_NEEDS,
    Needs("rope.*", "init_from", SET, OF_CHECKPOINT),
    Needs("add_tokens", "init_from", SET, OF_CHECKPOINT),
    Needs("add_special_tokens", "init_from", SET, OF_CHECKPOINT),
    Needs("vocab_multiple_of", "init_from", SET, OF_CHECKPOINT),
    Needs("qat_group_size", "qat_bits", (2, 3, 4, 8), "weights that are not rounded have no groups; remove it"),
    Needs("qat_bits", "bitnet", ("none",), "a weight is rounded in one way; remove one of the two"),
    Needs("model.vocab_size", "init_from", SET, "a new model has the ids of the tokenizer; remove it", only_named=True),
    Needs("tokens", "params", SET, "without it, --train.max_steps or --train.epochs say how long the run is"),
    Needs("params", "init_from", (None,), "a checkpoint has its shape; remove it"),
    *(Needs(name, "params", (None,), "it follows from it; remove one of the two", only_named=True) for name in DIALLED),
    Needs("data.mix", "data.train", ((),), MIXED),
    Needs("data.mix", "data.weights", ((),), MIXED),
    Needs("data.dir", "data.mix", (None,), "the directories of a mixture take its place; remove it", only_named=True),
    *(
        Needs(f"train.{name}", other, values, "weights are rounded by whole matrices; remove it")
        for name in ("tp", "pp")
        for other, values in (("bitnet", ("none",)), ("qat_bits", (0,)))
    ),
    Needs("check", "train.backend", ("single",), "one process looks at a run; remove it for the check"),
    Needs("model.multiple_of", "init_from", (None,), WIDTH, only_named=True),
    Needs("model.ffn_dim_multiplier", "init_from", (None,), WIDTH, only_named=True),
)


@dataclass(frozen=True)
class DataArgs:
    """Token bins and batches."""

    train: tuple[Path, ...] = ()
    """token bins to train on; default: every train*.bin in --data.dir"""
    weights: tuple[float, ...] = ()
    """number of times that each bin of --data.train is used in an epoch; default: once"""
    mix: dict[str, float | str] | None = None
    """directories like --data.dir, each with its share of the rows: data/zh 0.7 data/en 0.3. Shares may change:
    0.7,0.2@0.8 is 0.7 at first, and 0.2 from 80 % of the run on (@9000: from step 9000 on)"""
    dir: Path = Path("data/tiny")
    """directory that data_process.py wrote: train*.bin, heldout.bin, tokenizer/"""
    verify: bool = False
    """also compare bins above 512 MB with the SHA-256 in their .json (2 s a GB); smaller bins are always compared"""
    seq_len: Annotated[int, (1, 2147483647)] = 128
    """tokens per row of a batch"""
    batch_size: Annotated[int, (1, 10000000)] = 64
    """rows per optimizer step, in total over all processes and micro-batches"""
    isolate_documents: bool = False
    """attend only to tokens of the same document, where a row contains several"""

    def folders(self) -> list[Path]:
        """Return the directories of the data: those of --data.mix, or --data.dir."""
        return [Path(name) for name in self.mix] if self.mix else [self.dir]


@dataclass(frozen=True)
class Args:
    """Pretrain a LLaMA2 model on token bins."""

    model: NewModelArgs = field(default_factory=NewModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    out: Path = Path("out/tiny/pretrain")
    """directory of the run: checkpoints, logs, the resolved config"""
    init_from: Path | None = None
    """checkpoint to continue training from; --model.* flags must match it, except for a larger --model.max_seq_len"""
    bitnet: Literal[("none", *BITNETS)] = "none"  # type: ignore[valid-type]
    """train linear layers but the head with weights of few bits and inputs of 8. b158 (Ma et al. 2024): -1, 0, 1; b1
    (Wang et al. 2023): -1, 1. quantize.py --method bitnet packs the result"""
    params: str | None = None
    """number of parameters of a new model, such as 15M: its shape, the batch, the rates and the number of steps follow
    from it and from --tokens by the rules in docs/training.md"""
    tokens: str | None = None
    """tokens to train on with --params: a number such as 300M, or 20x for twenty a parameter, which is the default"""
    check: bool = False
    """look at the machine, the data and the first steps of this run, say what is wrong, and do not train"""
    qat_bits: Literal[0, 2, 3, 4, 8] = 0
    """train linear layers but the head with weights that are rounded to this many bits in every step; 0: off.
    quantize.py --method qat packs the result, without any further loss"""
    qat_group_size: Annotated[int, (-1, 1048576)] = 128
    """weights of a row that share a scale, with --qat_bits; -1: the whole row"""
    rope: RopeArgs = field(default_factory=RopeArgs)
    add_tokens: tuple[str, ...] = ()
    """words or other pieces of text to add to the vocabulary of --init_from, or a file with one per line"""
    add_special_tokens: tuple[str, ...] = ()
    """control tokens to add, e.g. <|im_start|>. Text never turns into them; only a chat template inserts them."""
    vocab_multiple_of: Annotated[int, (1, 1048576)] = 1
    """when the vocabulary grows, round its size up to a multiple of this number"""

    def __post_init__(self) -> None:
        """Raise ValueError where a flag needs another one to have another value."""
        check_flags(self, NEEDS)
        if self.qat_group_size == 0:
            raise ValueError("--qat_group_size should be -1 (the whole row) or at least 1, found 0")


if __name__ == "__main__":
    arguments = parse(Args, "pretrain")  # before torch is loaded: --help and mistakes are answered at once

import torch

from bins.mixture import read_phases
from bins.token_bin import TokenBin, find_bins
from checkpoint import config_json, sharded
from checkpoint.directory import load_weights, load_whole_model, save_model
from checkpoint.extend import (
    add_tokens,
    changed_fields,
    check_shape,
    check_tokenizer,
    fit_vocabulary,
    read_tokens,
    stretch_positions,
)
from checkpoint.locate import is_model, model_in, read_config, read_stop_ids
from checkpoint.safetensors_files import weight_files
from checkpoint.transformers_model import TransformersModel
from checks.check import conclude, lines
from checks.learning import training_checks
from dataset import MixedData, PretrainData, composition
from distributed.backend import make_backend, n_processes, refuse_slow_dtype
from files import alone_in
from model import Transformer
from optim.optimizers import build_optimizer
from planning import dial
from quant.qat import kind_of
from quant.train_bits import train_in_bits
from quant.trained import kind_of_bits
from tokenizer import Tokenizer, check_saving, load_tokenizer
from training.backend import options_of
from training.checksums import check_model
from training.identity import check_outside
from training.log import summary
from training.samples import Prompt, Sampler, beginnings
from training.trainer import Trainer, about


def main(args: Args) -> dict[str, Any]:
    """Train to the end of the schedule; return the final metrics and the directory of the model."""
    refuse_slow_dtype(args.train.dtype, args.train.device)
    if args.init_from is not None:
        args = with_values(args, init_from=model_in(args.init_from))
        check_outside(args.out, args.init_from, args.train.resume)
        check_model(args.init_from)
    torch.manual_seed(args.train.seed)
    tokenizer = load_tokenizer(tokenizer_directory(args))
    args, told = dialled(args, tokenizer.vocab_size)
    sources, heldout = open_bins(args.data)
    bins = [each for source in sources for each in source]
    for each in [*bins, *heldout]:
        each.check(tokenizer.sha256(), tokenizer.vocab_size, tokenizer.begins, args.data.verify)
    if args.add_tokens or args.add_special_tokens:
        tokenizer = add_tokens(tokenizer, read_tokens(args.add_tokens), read_tokens(args.add_special_tokens))
    check_saving(tokenizer)
    data, eval_data = make_data(args, sources, heldout, tokenizer)
    model, changes = make_model(args, tokenizer)
    with make_backend(args.train.backend, args.train.device, options_of(args.train, args.data.batch_size)) as backend:
        backend.place(model)
        stops = args.init_from and read_stop_ids(args.init_from)  # those of the model that goes on
        trainer = Trainer(
            model=model,
            optimizer=build_optimizer(model, args.optim),
            data=data,
            backend=backend,
            args=args.train,
            optim=args.optim,
            run=args.out,
            save=partial(save_model, model=model, tokenizer=tokenizer, stop_ids=stops),
            load=partial(load_weights, model),
            identity=identity(args, bins, data, model),
            eval_data=eval_data,
            token_bytes=tokenizer.token_bytes(),
            sampler=make_sampler(args, model, tokenizer, heldout or bins),
            shards=sharded.saver_of(model),
        )
        if args.check:
            found = training_checks(trainer, new=args.init_from is None)
            print(*lines(found), sep="\n", flush=True)
            return conclude(found)
        with alone_in(args.out) if backend.main else contextlib.nullcontext():
            if backend.main:
                described = [each.path.with_suffix(".json") if each.meta else each.path for each in bins]
                over = trainer.nothing_to_do
                record = {"training": about(trainer), "data": composition(data, heldout)}
                settings, step = resolved(args, model), trainer.state.step
                record_training(args.out, "pretrain", settings, described, step, over, about=record)
                size = f"{model.n_parameters():,} parameters, {data.batch_size * data.seq_len:,} tokens a step"
                print(*changes, *filter(None, [told]), size, sep="\n", flush=True)
                if eval_data is None:
                    say(f"{args.data.folders()[0] / 'heldout.bin'} is missing: {UNMEASURED}")
            result = trainer.fit()
            if backend.main:
                # raw: a model that was only pretrained has never seen the markers of a chat
                hint = f"Try it: python eval.py --model {result['model']} --raw True"
                print(summary(result), hint, sep="\n", flush=True)
            return result


def dialled(args: Args, vocab_size: int) -> tuple[Args, str]:
    """Return `args` with what --params and --tokens determine, these two removed, and a line about it."""
    if args.params is None:
        return args, ""
    recipe = dial.turn(args.params, args.tokens or "20x", vocab_size, args.data.seq_len, args.model)
    others = {name: value for name, value in vars(args.model).items() if name not in dial.OWN}
    model = NewModelArgs(**others | recipe.model)
    micro = args.train.micro_batch_size or recipe.micro_batch_size
    changes = {
        "model": model,
        "optim": dial.changed_optim(args.optim, recipe),
        "data": replace(args.data, batch_size=recipe.batch_size),
        "train": replace(args.train, max_steps=recipe.max_steps, micro_batch_size=micro),
    }
    told = (
        f"--params {args.params}: width {model.dim}, {model.n_layers} layers, {model.n_heads} heads; "
        f"{recipe.tokens:,.0f} tokens in {recipe.max_steps:,} steps of {recipe.batch_size:,} rows; lr "
        f"{recipe.optim['lr']:g}, muon_lr {recipe.optim['muon_lr']:g} (parameters with a vocabulary of {vocab_size:,})"
    )
    return with_values(args, params=None, tokens=None, **changes), told


def make_data(
    args: Args, sources: list[list[TokenBin]], heldout: list[TokenBin], tokenizer: Tokenizer
) -> tuple[PretrainData, PretrainData | None]:
    """Return the batches to train on, and those to evaluate on; None where nothing is held out."""
    rows = {name: getattr(args.data, name) for name in ("seq_len", "batch_size", "isolate_documents")}
    if tokenizer.eos_id is not None:
        rows["headerless_eos_id"] = tokenizer.eos_id
    bins = [each for source in sources for each in source]
    data = PretrainData(bins, seed=args.train.seed, weights=args.data.weights or None, **rows)
    if args.data.mix:
        phases = read_phases(args.data.mix, args.train.steps(data.steps_per_epoch))
        data = MixedData(sources, phases, seed=args.train.seed, **rows)
    return data, PretrainData(heldout, seed=0, shuffle=False, **rows) if heldout else None


def make_sampler(
    args: Args, model: Transformer | TransformersModel, tokenizer: Tokenizer, bins: list[TokenBin]
) -> Sampler:
    """Return what lets the model continue --train.prompts, or else the beginnings of documents of the first bin."""
    before = tokenizer.begins or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    prompts = [Prompt(text, [*before, *tokenizer.encode(text)]) for text in args.train.prompts]
    if not prompts:
        prompts = beginnings(bins[0], tokenizer.decode, tokenizer.eos_id)
    ends = {"stop_ids": [] if tokenizer.eos_id is None else [tokenizer.eos_id], "n_ids": tokenizer.vocab_size}
    return Sampler(model, prompts, args.train.sample_tokens, decode=tokenizer.decode, **ends)


def tokenizer_directory(args: Args) -> Path:
    """Return the directory of the tokenizer: the one beside the data, else that of --init_from."""
    beside = args.data.folders()[0] / "tokenizer"
    return beside if beside.exists() or args.init_from is None else args.init_from


def open_bins(data: DataArgs) -> tuple[list[list[TokenBin]], list[TokenBin]]:
    """Return the bins to train on of each source of --data.mix (of one source without it), and the held-out bins."""
    sources, heldout = [], []
    for folder in data.folders():
        paths = data.train or find_bins(folder, "train*.bin")
        if not paths:
            raise FileNotFoundError(f"no train*.bin in {folder}; make them with: python data_process.py --out {folder}")
        sources.append([TokenBin(path) for path in paths])
        heldout += [TokenBin(path) for path in find_bins(folder, "heldout.bin")]
    return sources, heldout


def make_model(args: Args, tokenizer: Tokenizer) -> tuple[Transformer | TransformersModel, list[str]]:
    """Return a new model, or the model of --init_from with the changes from the flags; and the changes in words."""
    if args.init_from is None:
        length = length_so_far(args) or args.data.seq_len
        shape = args.model.made(tokenizer.vocab_size, length)
        n_bytes, smaller = 4 * shape.n_parameters(), "make --model.dim or --model.n_layers smaller"
        if starts_in_parts(args):  # the backend draws the weights, matrix by matrix, and keeps its part of each
            check_memory("a process's part of the model", n_bytes // n_processes(), smaller)
            with torch.device("meta"):
                return Transformer(shape, initialize=False), []
        check_memory("the model", n_bytes, smaller)
        model = Transformer(shape)
        return model, in_bits(model, args)
    model, asked = load_whole_model(args.init_from, to_train=True), changed_fields(args.model)
    own = None
    with contextlib.suppress(FileNotFoundError):  # weights without a tokenizer go on with that of the data
        own = load_tokenizer(args.init_from)
        check_tokenizer(own, tokenizer, args.init_from, args.data.folders()[0])
    if isinstance(model, TransformersModel):
        if asked or args.rope != RopeArgs():
            raise ValueError(
                f"--model.*, --rope.* need a model of the LLaMA family, found --init_from {args.init_from}: remove them"
            )
        changes = []
    else:
        check_shape(model.args, asked, args.init_from)
        changes = [stretch_positions(model, args.rope, asked.get("max_seq_len"))]
    changes.append(fit_vocabulary(model, own, tokenizer, args.init_from, args.vocab_multiple_of))
    changes += in_bits(model, args)
    return model, [change for change in changes if change]


def starts_in_parts(args: Args) -> bool:
    """Return whether each process makes only its part of a new model, so that none ever holds all of it."""
    divided = args.train.backend == "fsdp" or max(args.train.tp, args.train.pp) > 1
    clex = (args.model.rope_scaling or {}).get("rope_type") == "clex"  # it draws weights of its own
    return divided and not clex and args.bitnet == "none" and not args.qat_bits


def in_bits(model: Transformer | TransformersModel, args: Args) -> list[str]:
    """Make the linear layers of a model those of --bitnet or --qat_bits; returns the change in words."""
    if args.bitnet == "none" and not args.qat_bits:
        return []
    flag, kind = f"--bitnet {args.bitnet}", args.bitnet
    words = "-1, 0, 1" if kind == "b158" else "-1, 1"
    if args.qat_bits:
        flag, kind = f"--qat_bits {args.qat_bits}", kind_of(args.qat_bits, args.qat_group_size)
        whole = args.qat_group_size == -1
        words = f"{args.qat_bits} bits, {'a scale for each row' if whole else f'in groups of {args.qat_group_size}'}"
    if isinstance(model, TransformersModel):
        raise ValueError(f"{flag} is for models of the LLaMA family, and {args.init_from} is none: remove it")
    if (found := kind_of_bits(model)) not in (None, kind):
        raise ValueError(f"{flag} does not fit {args.init_from}, which was trained with {found}: remove it")
    train_in_bits(model, kind)
    return [f"linear layers but the head are trained with weights of {words}"]


def length_so_far(args: Args) -> int | None:
    """Return the context of the run that goes on, which earlier versions set to 256 tokens; None where none goes on."""
    last = args.out / "last"
    return config_json.read(read_config(last)).max_seq_len if args.train.resume == "auto" and is_model(last) else None


def resolved(args: Args, model: Transformer | TransformersModel) -> Args:
    """Return `args` with the shape of `model`, for config.yaml, from which the same run can be started again.

    With --init_from, the vocabulary and the scaling of positions stay what the flags said: they change that model.
    """
    if isinstance(model, TransformersModel):
        return args
    changed = () if args.init_from is None else ("vocab_size", "rope_scaling")
    return with_values(args, model=model.args.replace(**{name: getattr(args.model, name) for name in changed}))


def identity(
    args: Args, bins: list[TokenBin], data: PretrainData, model: Transformer | TransformersModel
) -> dict[str, Any]:
    """Return the settings that determine the sequence of losses; only the same settings resume a checkpoint."""
    same = {
        "seed": args.train.seed,
        "seq_len": args.data.seq_len,
        "batch_size": args.data.batch_size,
        "tokens": [len(each) for each in bins],
        "data": {f"{each.path.name} ({number})": each.sha256() for number, each in enumerate(bins, 1)},
        "weights": list(args.data.weights),
        "mix": data.phases if isinstance(data, MixedData) else None,
        "isolate_documents": args.data.isolate_documents,
        "optimizer": args.optim.optimizer,
        "init_from": args.init_from and [file_sha256(path) for path in weight_files(args.init_from)],
    }
    changes = {name: to_plain(getattr(args, name)) for name in CHANGES if getattr(args, name) != getattr(Args(), name)}
    return same | changes | {"shape": to_plain(model.args)}  # last: where a flag has changed it, the flag is named


if __name__ == "__main__":
    advice = "a smaller --train.micro_batch_size or --data.seq_len, or --train.gradient_checkpointing True, takes less"
    run(main, arguments, less_memory=advice)

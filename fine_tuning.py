"""Fine-tune a model on conversations: the loss is on the assistant's words and on the end of each of its turns. Or on
pairs of answers, one preferred to the other (--objective dpo, orpo).

python fine_tuning.py --config configs/tiny.yaml
python fine_tuning.py --init_from DIR --data my_conversations.jsonl --out out/mine
python fine_tuning.py --init_from DIR --data poems,medical.jsonl --data.loss task_token    # two tasks
python fine_tuning.py --init_from out/mine/best --objective dpo --data my_pairs.jsonl --out out/mine_dpo

python dataset_sft.py --data my_conversations.jsonl --model DIR shows what of them is trained.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

import attention
import config
import lora
import tasks
from chat_template import ChatTemplate, load_template
from checkpoint import load_model, load_weights, save_model, weight_files
from corpora import BadRecord
from dataset import BatchSource
from dataset_sft import Samples, read_samples
from distributed import SingleProcess, make_backend
from evaluation import evaluate
from foreign import ForeignModel
from model import Transformer
from optim import OptimArgs, build_optimizer
from packing import Packing, SFTData
from pairs import PairData, read_pairs
from preference import PreferenceArgs, PreferenceModel, make_objective, reference
from tokenizer import Tokenizer, load_tokenizer
from trainer import TrainArgs, Trainer, prepare

ANY_LENGTH = 2**31  # tokens: longer than any sample


@dataclass(frozen=True)
class DataArgs:
    """Conversations and batches."""

    train: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["--data"])] = (Path("data/tiny/sft_train.jsonl"),)
    """conversations in any of the usual forms (json, jsonl, csv, tsv, parquet, a folder of them, a loader in Python);
    several paths, or one with commas, are several tasks"""
    heldout: tuple[Path, ...] = ()
    """conversations to evaluate on, for each task; none: heldout_share of train; a missing file: no evaluation"""
    heldout_share: float = 0.02
    """the share of train to evaluate on and not to train, by the hash of the question; 0: no evaluation"""
    template: str = "auto"
    """auto (the model's own, else ours), own, ours, plain, chatml, llama2, mftcoder, or the path of a .jinja file"""
    train_on: Literal["all", "last"] = "all"
    """the answers of a conversation that are trained; one with "loss": false in its record never is"""
    seq_len: int = 128
    """tokens in a row of a batch; of pairs, in each of the two texts"""
    batch_size: int = 64
    """rows of an optimizer step, over all processes and micro-batches"""
    packing: Packing = "best_fit"
    """best_fit: several samples a row, hidden from each other; concat: one after another, cut where a row ends; bucket:
    one a row, padded to the longest of a step of about equal ones; none: likewise of any"""
    too_long: Literal["cut", "drop"] = "cut"
    """what happens to a sample that does not fit a row (concat takes it whole)"""
    loss: tasks.Loss = "token"
    """a step's mean over its targets (token), samples, tasks by target (task_token) or by sample (task_sample), which
    are MFTCoder's case1, 2, 3 and 4 over the whole step; coba: task_token, its weights by how each task converges"""
    weights: tuple[float, ...] = ()
    """of the tasks, for task_token and task_sample; none: equal ones"""
    temperature: float = 1.0
    """small tasks are seen more often: samples of one of n are taken in proportion to n^(1/temperature)"""
    coba_interval: int = 1
    """steps between CoBa's measures, each on one held-out batch, which take turns"""
    coba_warmup: int = 100
    """measures before the weights begin to change"""
    coba_history: int = 200
    """measures that a slope is fitted to"""
    coba_tau: float = 5.0
    """how sharply CoBa turns to tasks that diverge"""

    def __post_init__(self) -> None:
        """Raises ValueError where weights have nothing to weigh."""
        if self.weights and self.loss not in ("task_token", "task_sample"):
            raise ValueError(
                f"--data.weights are of tasks: they go with --data.loss task_token or task_sample, not {self.loss}"
            )


@dataclass(frozen=True)
class Args:
    """Fine-tune a model, or adapters of it (--lora.method), on conversations."""

    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=lambda: OptimArgs(lr=1e-3, muon_lr=2e-3, schedule="linear"))
    lora: lora.LoraArgs = field(default_factory=lora.LoraArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    objective: Literal["sft", "dpo", "orpo"] = "sft"
    """sft: to answer as in conversations; dpo, orpo: to prefer the chosen of two answers to the rejected one, which
    --data gives as pairs"""
    preference: PreferenceArgs = field(default_factory=PreferenceArgs)
    neftune_alpha: float = 0.0
    """noise on the embeddings in training (NEFTune, 5 is usual); 0: none"""
    init_from: Path = Path("out/tiny/pretrain/best")
    """the model directory to start from"""
    out: Path = Path("out/tiny/sft")
    """run directory: checkpoints, logs, the resolved config"""

    def __post_init__(self) -> None:
        """Raises ValueError where settings of one objective meet another."""
        if self.objective == "sft":
            if self.preference != PreferenceArgs():
                raise ValueError("--preference.* are settings of --objective dpo and orpo, not of sft")
            return
        make_objective(self.objective, self.preference)
        if self.data.loss != "token" or len(tasks.split_paths(self.data.train)) > 1:
            raise ValueError(f"--objective {self.objective} is of one task: one path of pairs, without --data.loss")
        if self.data.packing not in ("best_fit", "none"):
            raise ValueError(f"pairs of answers are packed best_fit or none, found --data.packing {self.data.packing}")


def main(args: Args) -> dict[str, Any]:
    """Train to the end of the schedule; returns the final measures and where the model lies."""
    torch.manual_seed(args.train.seed)
    model = load_model(args.init_from)
    tokenizer = load_tokenizer(args.init_from)
    template = load_template(tokenizer, args.data.template)
    tokenizer.chat_template = template.jinja  # what it is trained on is what it is saved with
    broken: dict[Path, list[BadRecord]] = {}
    paths = tasks.split_paths(args.data.train)
    names = tasks.task_names(paths)
    in_pairs = args.objective != "sft"
    trained, heldout = read_data(args.data, paths, template, broken, in_pairs)
    data, eval_data = (pair_batches if in_pairs else batches)(args.data, args.train.seed, trained, heldout)
    with make_backend(args.train.backend, args.train.device, fp16=args.train.dtype == "fp16") as backend:
        model.to(backend.device)
        save, load = adapt(model, args, tokenizer, template)
        coba = balance(args, data, eval_data, model, backend, names) if args.data.loss == "coba" else None
        trainer = Trainer(
            preferring(model, args, data, eval_data, backend) if in_pairs else model,
            build_optimizer(model, args.optim),
            data,
            backend,
            args.train,
            args.optim,
            args.out,
            save=save,
            load=load,
            identity=identity(args, names, trained, template.jinja),
            eval_data=eval_data,
            token_bytes=None if in_pairs else tokenizer.token_bytes(),
            group_names=names if len(names) > 1 else (),
            adaptive=coba,
        )
        with config.alone_in(args.out) if backend.main else nullcontext():
            if backend.main:
                config.record_run(args.out, "fine_tuning", args, inputs=[path for path in paths if path.is_file()])
                print(describe(args.data, paths, trained, heldout, data), flush=True)
                print(lora.describe(model), flush=True)
                for path, name in zip(broken, tasks.task_names(list(broken))):
                    keep_aside(path, broken[path], args.out / f"broken_{name.replace('/', '_')}.jsonl")
            return trainer.fit()


def adapt(
    model: Transformer | ForeignModel, args: Args, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """Make the model train as `args` say; returns what puts its trained weights into a checkpoint and takes them
    back: the whole model, or the adapter alone as a PEFT directory."""
    if args.neftune_alpha:
        lora.neftune(model.model.embed_tokens, args.neftune_alpha)
    if args.lora.method == "none":
        save = partial(save_model, model=model, tokenizer=tokenizer, stop_ids=template.stop_ids)
        return save, partial(load_weights, model)
    tree = getattr(model, "inner", model)  # the names in an adapter's file are those that transformers gives
    lora.apply(tree, args.lora)

    def save_adapter(directory: Path) -> None:
        lora.save(directory, tree, base=str(args.init_from))
        tokenizer.save(directory)
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": template.stop_ids}))

    return save_adapter, partial(lora.restore, tree)


def read_data(
    data: DataArgs, paths: list[Path], template: ChatTemplate, broken: dict[Path, list[BadRecord]], in_pairs: bool
) -> tuple[list[Samples], list[Samples] | None]:
    """What is trained and what is held out of each task, None if nothing is; the records that are none go to `broken`,
    by file."""
    read = partial(read_pairs if in_pairs else read_samples, template=template, too_long=data.too_long)
    read = read if in_pairs else partial(read, train_on=data.train_on)
    seq_len = ANY_LENGTH if data.packing == "concat" else data.seq_len
    given = tasks.split_paths(data.heldout)
    if given and len(given) != len(paths):
        raise ValueError(f"--data.heldout should name one path for each of {len(paths)} tasks, found {len(given)}")
    if not 0 <= data.heldout_share < 1:
        raise ValueError(f"--data.heldout_share should be from 0 to below 1, found {data.heldout_share}")
    if given:
        trained = [read(path, seq_len=seq_len, broken=broken.setdefault(path, [])) for path in paths]
        if not all(path.exists() for path in given):
            return trained, None
        return trained, [read(path, seq_len=data.seq_len, broken=broken.setdefault(path, [])) for path in given]
    trained = [
        read(path, held_out=False, share=data.heldout_share, seq_len=seq_len, broken=broken.setdefault(path, []))
        for path in paths
    ]
    apart = paths if data.heldout_share else []
    heldout = [read(path, held_out=True, share=data.heldout_share, seq_len=data.seq_len) for path in apart]
    return trained, heldout if any(map(len, heldout)) else None


def batches(
    args: DataArgs, seed: int, trained: list[Samples], heldout: list[Samples] | None
) -> tuple[BatchSource, SFTData | None]:
    """What the loop trains on, weighed as asked, and what it evaluates on."""
    if (w := args.weights) and not (len(w) == len(trained) and min(w) >= 0 and 0 < sum(w) < math.inf):
        found = " ".join(map(str, w))
        raise ValueError(
            f"--data.weights should be {len(trained)} numbers of 0 or more, not all of them 0, found {found}"
        )
    samples, groups = tasks.join(trained, args.temperature, seed)
    per_sample = args.loss in ("sample", "task_sample")
    shape = (args.seq_len, args.batch_size)
    data = SFTData(
        samples, *shape, seed, args.packing, groups=groups if len(trained) > 1 else None, per_sample=per_sample
    )
    source: BatchSource = data
    if args.loss != "token":
        weights = None if args.loss == "sample" else args.weights or [1.0] * len(trained)
        source = tasks.Weighted(data, weights)
    if heldout is None:
        return source, None
    whole: Packing = "best_fit" if args.packing == "concat" else args.packing  # no answer is judged by its second half
    samples, groups = tasks.join(heldout)
    several = len(heldout) > 1  # then shuffled, so that the first batches hold something of each
    return source, SFTData(samples, *shape, 0, whole, shuffle=several, groups=groups if several else None)


def pair_batches(
    args: DataArgs, seed: int, trained: list[Samples], heldout: list[Samples] | None
) -> tuple[PairData, PairData | None]:
    """What the loop trains on and what it evaluates on, of pairs, which are numbered through."""
    shape = (args.seq_len, args.batch_size)
    data = PairData(*trained, *shape, seed, args.packing)
    if heldout is None:
        return data, None
    return data, PairData(*heldout, *shape, 0, args.packing, shuffle=False, first=data.n_pairs)


def preferring(
    model: Transformer | ForeignModel, args: Args, data: PairData, heldout: PairData | None, backend: SingleProcess
) -> PreferenceModel:
    """The model that learns to prefer, beside its reference, if it has one: itself as it is now."""
    tuned = PreferenceModel(model, make_objective(args.objective, args.preference))
    if tuned.objective.has_reference and data.seq_len <= model.args.max_seq_len:  # else the loop refuses it
        prepare(tuned, args.train, backend.device)  # in the dtype of the training
        sources = [data] if heldout is None else [data, heldout]
        with attention.use(args.train.attention):
            cache, size = args.out / "reference.npz", args.train.micro_batch_size
            tuned.reference = reference(tuned, sources, backend, cache, size)
    return tuned


def balance(
    args: Args,
    data: tasks.Weighted,
    heldout: SFTData | None,
    model: Transformer | ForeignModel,
    backend: SingleProcess,
    names: list[str],
) -> tasks.CoBa:
    """CoBa over the tasks of `data`, measured on one batch of `heldout` after another."""
    if heldout is None or len(names) < 2:
        raise ValueError(
            "--data.loss coba balances tasks by their held-out losses: it needs two tasks and held-out data"
        )
    keys = [f"loss/{name}" for name in names]

    def measure(number: int) -> list[float]:
        size = args.train.micro_batch_size
        measures = evaluate(model, heldout, None, 1, backend, size, names, first=number)
        return [measures.get(key, math.nan) for key in keys]

    d = args.data
    return tasks.CoBa(data, measure, names, d.coba_interval, d.coba_warmup, d.coba_history, d.coba_tau)


def keep_aside(path: Path, broken: list[BadRecord], aside: Path) -> None:
    """Write the broken records of `path`, if there are any, into the file `aside`, and say so."""
    if broken:
        aside.write_text("".join(json.dumps(vars(record), ensure_ascii=False) + "\n" for record in broken), "utf8")
        print(f"{path}: {len(broken)} broken records kept aside in {aside}; the first: {broken[0].reason}", flush=True)


def describe(
    args: DataArgs, paths: list[Path], trained: list[Samples], heldout: list[Samples] | None, data: BatchSource
) -> str:
    """Lines that tell what is trained, how full the batches are, and on what the model is evaluated."""
    lines = [
        f"{path}: " + ", ".join(f"{name} {number}" for name, number in samples.stats.items())
        for path, samples in zip(paths, trained)
    ]
    rows = getattr(data, "source", data)  # what it is before it is weighed
    share = rows.samples.mask.sum() / (np.diff(rows.samples.offsets.astype(np.int64)) - 1).sum()
    filled = rows.packing_efficiency
    lines[-1] += f"; {filled:.1%} of the positions hold samples, {filled * share:.1%} have a target"
    lines += [told for path, samples in zip(paths, trained) if (told := too_long(path, samples.stats, args.seq_len))]
    if heldout is None:
        why = f"there is no {', '.join(map(str, args.heldout))}" if args.heldout else "no conversation is held out"
        return "\n".join([*lines, f"{why}: nothing is evaluated on the way"])
    shared = f"{args.heldout_share:.0%} of {', '.join(map(str, paths))}, by the hash of their questions"
    source = ", ".join(map(str, args.heldout)) or shared
    counts = " + ".join(str(len(samples)) for samples in heldout)
    what = f"{len(heldout[0]) // 2} pairs" if isinstance(data, PairData) else f"{counts} samples"
    return "\n".join([*lines, f"held out to evaluate on: {what} ({source})"])


def too_long(path: Path, stats: dict[str, int], seq_len: int) -> str:
    """What rows of seq_len tokens leave out of a file, and what to do about it; nothing if they hold all of it."""
    left_out = stats["dropped"] + stats["without_target"]
    if not stats["cut"] and not stats["dropped"]:
        return ""
    share = (stats["cut"] + left_out) / (stats.get("pairs") or stats["conversations"])
    return (
        f"{path}: of {share:.0%} of the records something is not trained, since rows are {seq_len} tokens long: "
        f"{stats['cut']} lose their end, {left_out} are left out; --data.seq_len takes longer ones"
    )


def identity(args: Args, names: list[str], trained: list[Samples], jinja: str) -> dict[str, Any]:
    """What fixes the order of the losses, so that a checkpoint is resumed by the same run only."""
    return {
        "seed": args.train.seed,
        "seq_len": args.data.seq_len,
        "batch_size": args.data.batch_size,
        "packing": args.data.packing,
        "samples": [samples.stats for samples in trained] if len(trained) > 1 else trained[0].stats,
        "tasks": names if len(names) > 1 else None,
        "loss": None if args.data.loss == "token" else [args.data.loss, *args.data.weights],
        "temperature": None if args.data.temperature == 1 else args.data.temperature,
        "template": hashlib.sha256(jinja.encode()).hexdigest(),
        "objective": None if args.objective == "sft" else [args.objective, config.to_plain(args.preference)],
        "optimizer": args.optim.optimizer,
        "lora": None if args.lora.method == "none" else config.to_plain(args.lora),
        "neftune_alpha": args.neftune_alpha or None,
        "init_from": [config.file_sha256(path) for path in weight_files(args.init_from)],  # not only where it lies
    }


if __name__ == "__main__":
    config.run(main, Args, "fine_tuning")

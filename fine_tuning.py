"""Fine-tune a model on conversations: the loss is on the assistant's words and on the end of each of its turns. Or on
pairs of answers, one preferred to the other (--objective dpo and others).

python fine_tuning.py --config configs/tiny.yaml
python fine_tuning.py --init_from DIR --data my_conversations.jsonl --out out/mine
python fine_tuning.py --init_from DIR --data poems,medical.jsonl --data.loss task_token    # two tasks
python fine_tuning.py --init_from out/mine/best --objective dpo --data my_pairs.jsonl --out out/mine_dpo
python fine_tuning.py --init_from DIR --data my_conversations.jsonl --show 3    # print samples, train nothing
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cli.args import parse, run, with_values
from cli.flags import check_flags
from cli.record import beginning, file_sha256, record_training, to_plain
from lora.spec import LoraArgs
from optim.args import OptimArgs
from training.args import TrainArgs
from tuning.args import NEEDS, OBJECTIVES, DataArgs, ObjectiveName, PreferenceArgs


@dataclass(frozen=True)
class Args:
    """Fine-tune a model, or adapters of it (--lora.method), on conversations."""

    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=lambda: OptimArgs(lr=1e-3, muon_lr=2e-3, schedule="linear"))
    lora: LoraArgs = field(default_factory=LoraArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    objective: ObjectiveName = "sft"
    """sft: answer as in the conversations of --data; the others: prefer the chosen of two answers to the rejected one,
    where --data holds pairs of answers"""
    preference: PreferenceArgs = field(default_factory=PreferenceArgs)
    neftune_alpha: Annotated[float, (0, 1000)] = 0.0
    """strength of the noise on the embeddings during training (NEFTune; 5 is usual); 0: no noise"""
    init_from: Path = Path("out/tiny/pretrain/best")
    """model directory to start from; with --show, a tokenizer is enough"""
    add_tokens: tuple[str, ...] = ()
    """pieces of text to add to the vocabulary, or a file with one on each line"""
    add_special_tokens: tuple[str, ...] = ()
    """control tokens to add, e.g. <|im_start|>. Text never turns into them; only a chat template inserts them"""
    show: Annotated[int, (0, 1000000)] = 0
    """print this many samples of each task, with the trained tokens marked, and statistics; do not train"""
    check: bool = False
    """look at the machine, the data and the first steps of this run, say what is wrong, and do not train"""
    out: Path = Path("out/tiny/sft")
    """run directory: checkpoints, logs, the resolved config"""

    def __post_init__(self) -> None:
        """Raise ValueError where a flag needs another one to have another value."""
        check_flags(self, NEEDS)


if __name__ == "__main__":
    arguments = parse(Args, "fine_tuning")  # before torch is loaded: --help and mistakes are answered at once

import torch

from chat.samples import Samples
from chat.show import statistics
from chat.template import ChatTemplate, load_template, set_date, template_hash
from checkpoint import peft, sharded
from checkpoint.directory import load_weights, load_whole_model, save_adapter, save_model
from checkpoint.extend import add_tokens, grow_vocabulary, read_tokens
from checkpoint.locate import model_in, read_stop_ids
from checkpoint.safetensors_files import weight_files
from checkpoint.transformers_model import TransformersModel
from checks.check import conclude, lines
from checks.learning import training_checks
from cli.progress import say
from distributed.backend import make_backend, refuse_slow_dtype
from files import alone_in
from lora import adapters
from model import Transformer
from optim.optimizers import build_optimizer
from tokenizer import check_saving, load_tokenizer
from training.backend import options_of
from training.checksums import check_model
from training.identity import check_outside
from training.log import summary
from training.precision import check_length, training_dtype
from training.samples import Prompt, Sampler
from training.trainer import Trainer, about
from tuning.balance import make_coba
from tuning.data import Split, check_heldout, keep_aside, read_split
from tuning.describe import composition, counts, describe, lengths, not_used, number, sample_texts, too_long
from tuning.objectives import make_objective
from tuning.prompts import questions_of


def main(args: Args) -> dict[str, Any]:
    """Train to the end of the schedule; return the final measures. With --show, print samples instead."""
    args = with_values(args, init_from=model_in(args.init_from))
    if args.show:
        return show(args)
    refuse_slow_dtype(args.train.dtype, args.train.device)
    check_outside(args.out, args.init_from, args.train.resume)
    check_model(args.init_from)
    objective = make_objective(args.objective, args.preference)
    names = [task.name for task in args.data.tasks]
    torch.manual_seed(args.train.seed)
    with make_backend(args.train.backend, args.train.device, options_of(args.train, args.data.batch_size)) as backend:
        model = load_whole_model(args.init_from, to_train=args.lora.method == "none")
        check_length(args.data.seq_len, model)
        began = beginning(args.out, fresh=args.train.resume == "never")
        template, grown = make_template(args, model, began)
        save, load = adapt(model, args, template, training_dtype(args.train, backend.device))
        model.to(backend.device)  # only now: a quantized base is small
        split = read_split(args.data, objective.kind, template)
        unmeasured = check_heldout(args.data, args.train.metric, split.heldout)
        data, eval_data = objective.batches(args.data, split, args.train.seed)
        coba = make_coba(args.data, data, eval_data, model, backend, args.train.micro_batch_size)
        sources = [source for source in (data, eval_data) if source is not None]
        trainer = Trainer(
            objective.wrap(model, sources, backend, args.train, args.out / "reference.npz"),
            build_optimizer(model, args.optim),
            data,
            backend,
            args.train,
            args.optim,
            args.out,
            save=save,
            load=load,
            identity=identity(args, split, template),
            eval_data=eval_data,
            token_bytes=template.tokenizer.token_bytes() if objective.of_tokens else None,
            group_names=names if len(names) > 1 else (),
            adaptive=coba,
            sampler=make_sampler(args, model, template, split.heldout or split.trained),
            shards=sharded.saver_of(model),
        )
        if args.check:
            found = training_checks(trainer, new=False)
            print(*lines(found), sep="\n", flush=True)
            return conclude(found)
        with alone_in(args.out) if backend.main else nullcontext():
            if backend.main:
                inputs = [task.path for task in args.data.tasks if task.path.is_file()]
                record = {"training": about(trainer), "data": composition(args.data, split)}
                step, over = trainer.state.step, trainer.nothing_to_do
                record_training(args.out, "fine_tuning", args, inputs, step, over, began, record)
                about_data = describe(args.data, split, objective.kind, data, model.args.max_seq_len)
                say("\n".join(filter(None, [about_data, unmeasured, grown, adapters.describe(model)])))
                keep_aside(split.broken, args.out)
                copy_examples(args)
            result = trainer.fit()
            if backend.main:
                print(summary(result), f"Try it: python eval.py --model {result['model']}", sep="\n", flush=True)
            return result


def show(args: Args) -> dict[str, Any]:
    """Print the first samples of each task, their targets marked, and what a run would tell of them; return the
    statistics by task."""
    objective = make_objective(args.objective, args.preference)
    tokenizer = load_tokenizer(args.init_from)
    if args.add_tokens or args.add_special_tokens:
        tokenizer = add_tokens(tokenizer, read_tokens(args.add_tokens), read_tokens(args.add_special_tokens))
    template = load_template(tokenizer, args.data.template)
    split = read_split(args.data, objective.kind, template)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    found = {}
    for task, samples in zip(args.data.tasks, split.trained):
        print(*sample_texts(samples, args.show, objective.kind, tokenizer, colour), sep="\n")
        found[task.name] = statistics(samples) | {"broken": len(split.broken[task.path]), "template": template.name}
        broken, unit = split.broken[task.path], objective.kind.records
        about = ["---", f"{task.path}:", counts(samples, unit), lengths(samples)]
        about += filter(None, [too_long(task.path, samples, unit, args.data.seq_len)])
        about += [f"Chat template: {template.name}.", *not_used(task.path, split.left_out[task.path])]
        about += [f"{number(len(broken), 'records')} cannot be read; the first:"] * bool(broken)
        print(*about, *(f"broken: {record.where}: {record.reason}" for record in broken[:3]), sep="\n")
    return found


def make_template(args: Args, model: Transformer | TransformersModel, began: datetime) -> tuple[ChatTemplate, str]:
    """Return the template to train with, its tokenizer grown by the tokens that `args` add to the vocabulary and to the
    model, and a note on these. A template that writes the date writes that of the run's first day, `began`."""
    tokenizer, grown = grow_vocabulary(
        model, load_tokenizer(args.init_from), args.add_tokens, args.add_special_tokens, args.init_from
    )
    template = load_template(tokenizer, args.data.template)
    tokenizer.chat_template = template.saved  # checkpoints carry the template that the model is trained with
    check_saving(tokenizer)
    set_date(template, began)  # a run that goes on another day has the same ids
    return template, grown


def make_sampler(
    args: Args, model: Transformer | TransformersModel, template: ChatTemplate, samples: list[Samples]
) -> Sampler:
    """Return what lets the model answer --train.prompts, or else questions of the data."""
    tokenizer, questions = template.tokenizer, [[{"role": "user", "content": text}] for text in args.train.prompts]
    prompts = [
        Prompt(messages[0]["content"], template.encode(messages, add_generation_prompt=True)[0])
        for messages in questions
    ]
    if not prompts:
        prompts = questions_of(samples, len(make_objective(args.objective, args.preference).kind.texts), tokenizer)
    ends = {"stop_ids": all_stops(template, args.init_from), "n_ids": tokenizer.vocab_size}
    return Sampler(model, prompts, args.train.sample_tokens, decode=tokenizer.decode, **ends)


def all_stops(template: ChatTemplate, directory: Path) -> list[int]:
    """Return the ids that end an answer: those of the template, and those of the model in `directory`."""
    n = template.tokenizer.vocab_size
    return sorted({*template.stop_ids, *(i for i in read_stop_ids(directory) or () if i < n)})


def adapt(
    model: Transformer | TransformersModel, args: Args, template: ChatTemplate, dtype: torch.dtype
) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """Put noise and adapters into the model as `args` say, with matrix products in `dtype`.

    Return two functions of a checkpoint directory that save and load what is trained: the whole model, or the adapter
    alone as a PEFT directory.
    """
    text = {"tokenizer": template.tokenizer, "stop_ids": all_stops(template, args.init_from)}
    if args.neftune_alpha:
        adapters.neftune(model.embedding, args.neftune_alpha)
    if args.lora.method == "none":
        save = partial(save_model, model=model, **text)
        return save, partial(load_weights, model)
    base = args.init_from
    if base.is_symlink():  # `best` may lead to other weights tomorrow
        base = base.parent / base.readlink()
    tree = model.module_tree
    adapters.apply(tree, args.lora, dtype)
    save = partial(save_adapter, tree=tree, base=str(base), **text)
    return save, partial(peft.restore, tree)


def copy_examples(args: Args) -> None:
    """Copy what data_process.py suggests to ask, beside its conversations, to the run, where the chat looks for it."""
    folders = dict.fromkeys(task.path.parent for task in args.data.tasks if task.path.name == "sft_train.jsonl")
    texts = [path.read_text(encoding="utf8") for folder in folders if (path := folder / "examples.txt").is_file()]
    if texts:
        (args.out / "examples.txt").write_text("".join(texts), encoding="utf8")


def contents(samples: Samples) -> str:
    """Return the hex SHA-256 of encoded samples: of their ids, what of them is trained, and where each begins."""
    sha256 = hashlib.sha256()
    for array in (samples.ids, samples.mask, samples.offsets):
        sha256.update(array.tobytes())
    return sha256.hexdigest()


def settings_of_objective(args: Args) -> dict[str, Any]:
    """Return the settings of the objective by name, as a checkpoint keeps them.

    Those of DPO stand in the checkpoints of every loss on pairs; what another loss has added stands in its own only, so
    that a run that began before is resumed.
    """
    kept = {*OBJECTIVES["dpo"], *OBJECTIVES[args.objective]}
    return {name: value for name, value in to_plain(args.preference).items() if name in kept}


def identity(args: Args, split: Split, template: ChatTemplate) -> dict[str, Any]:
    """Return all that determines the losses of a run: a checkpoint is resumed only by a run of the same identity."""
    trained, names = split.trained, [task.name for task in args.data.tasks]
    data = {name: contents(samples) for name, samples in zip(names, trained)}
    if args.data.loss == "coba":  # the one loss that the held-out samples determine, too
        data |= {f"held out of {name}": contents(samples) for name, samples in zip(names, split.heldout or [])}
    return {
        "seed": args.train.seed,
        "seq_len": args.data.seq_len,
        "batch_size": args.data.batch_size,
        "packing": args.data.packing,
        "samples": [samples.stats for samples in trained] if len(trained) > 1 else trained[0].stats,
        "tasks": names if len(names) > 1 else None,
        "loss": None if args.data.loss == "token" else [args.data.loss, *args.data.weights],
        "temperature": None if args.data.temperature == 1 else args.data.temperature,
        "template": template_hash(template.jinja + (template.tool_use.jinja if template.tool_use else "")),
        "objective": None if args.objective == "sft" else [args.objective, settings_of_objective(args)],
        "optimizer": args.optim.optimizer,
        "lora": None if args.lora.method == "none" else to_plain(args.lora),
        "neftune_alpha": args.neftune_alpha or None,
        "add_tokens": [*args.add_tokens, *args.add_special_tokens] or None,
        "init_from": [file_sha256(path) for path in weight_files(args.init_from)],  # the weights, wherever they lie
        "data": data,  # last: what a flag has changed is named by its flag
    }


if __name__ == "__main__":
    advice = "a smaller --train.micro_batch_size or --data.seq_len, or --train.gradient_checkpointing True, takes less"
    run(main, arguments, less_memory=f"{advice}, and --lora.method lora with --lora.base nf4 the least")

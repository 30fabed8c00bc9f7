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
from typing import Any, Literal

from cli.args import parse, run
from cli.record import file_sha256, record_run, to_plain
from lora.spec import LoraArgs
from optim.args import OptimArgs
from training.args import TrainArgs
from tuning.args import DataArgs, PreferenceArgs, split_paths, task_names


@dataclass(frozen=True)
class Args:
    """Fine-tune a model, or adapters of it (--lora.method), on conversations."""

    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=lambda: OptimArgs(lr=1e-3, muon_lr=2e-3, schedule="linear"))
    lora: LoraArgs = field(default_factory=LoraArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    objective: Literal["sft", "dpo", "orpo"] = "sft"
    """sft: to answer as in conversations; dpo, orpo: to prefer the chosen of two answers to the rejected one, which
    --data gives as pairs"""
    preference: PreferenceArgs = field(default_factory=PreferenceArgs)
    neftune_alpha: float = 0.0
    """noise on the embeddings in training (NEFTune, 5 is usual); 0: none"""
    init_from: Path = Path("out/tiny/pretrain/best")
    """the model directory to start from"""
    add_tokens: tuple[str, ...] = ()
    """pieces of text (or a file of one a line) that become tokens of the model"""
    add_special_tokens: tuple[str, ...] = ()
    """likewise, tokens that no text gives, such as the markers of a chat template"""
    out: Path = Path("out/tiny/sft")
    """run directory: checkpoints, logs, the resolved config"""

    def __post_init__(self) -> None:
        """Raises ValueError where settings of one objective meet another, or new tokens an adapter."""
        if self.lora.method != "none" and (self.add_tokens or self.add_special_tokens):
            raise ValueError(
                "new tokens change the model that an adapter belongs to: make that one first, with "
                f"python convert.py tokens --model {self.init_from} --out DIR, and adapt it by --init_from DIR"
            )
        if self.objective == "sft":
            if self.preference != PreferenceArgs():
                raise ValueError("--preference.* are settings of --objective dpo and orpo, not of sft")
            return
        if self.objective == "orpo" and (self.preference.label_smoothing or self.preference.sft_weight):
            raise ValueError("label_smoothing and sft_weight are settings of dpo; orpo has beta only")
        if self.data.loss != "token" or len(split_paths(self.data.train)) > 1:
            raise ValueError(f"--objective {self.objective} is of one task: one path of pairs, without --data.loss")
        if self.data.train_on != "all":
            raise ValueError("of pairs the last answers are trained: leave out --data.train_on")
        if self.data.packing not in ("best_fit", "none"):
            raise ValueError(f"pairs of answers are packed best_fit or none, found --data.packing {self.data.packing}")
        if self.train.s2_group:
            raise ValueError("pairs are trained in full attention, as their reference is asked: no --train.s2_group")
        if self.train.metric != "loss":  # told before the reference is asked
            raise ValueError(f"the best at pairs is that with the least loss, found --train.metric {self.train.metric}")


if __name__ == "__main__":
    arguments = parse(Args, "fine_tuning")  # before torch is loaded: --help and mistakes are answered at once

import torch

from attention import backends
from chat.samples import Samples
from chat.template import ChatTemplate, load_template
from checkpoint import peft
from checkpoint.directory import load_weights, load_whole_model, save_model
from checkpoint.extend import grow_vocabulary
from checkpoint.safetensors_files import weight_files
from checkpoint.transformers_model import TransformersModel
from corpora import BadRecord
from dataset_sft import PairData, SFTData
from distributed.backend import make_backend
from distributed.single import SingleProcess
from files import alone_in
from lora import adapters
from model import Transformer
from optim.optimizers import build_optimizer
from tokenizer import Tokenizer, load_tokenizer
from training.heldout import evaluate
from training.log import summary
from training.precision import check_length, prepare, training_dtype
from training.trainer import Trainer
from tuning import mixture
from tuning.balance import CoBa
from tuning.data import batches, describe, keep_aside, pair_batches, read_data
from tuning.objectives import make_objective
from tuning.preference_model import PreferenceModel
from tuning.reference import reference


def main(args: Args) -> dict[str, Any]:
    """Train to the end of the schedule; returns the final measures and where the model lies."""
    paths = split_paths(args.data.train)
    names = task_names(paths)
    in_pairs = args.objective != "sft"
    torch.manual_seed(args.train.seed)
    with make_backend(args.train.backend, args.train.device, fp16=args.train.dtype == "fp16") as backend:
        model = load_whole_model(args.init_from)
        check_length(args.data.seq_len, model)
        tokenizer, grown = grow_vocabulary(
            model, load_tokenizer(args.init_from), args.add_tokens, args.add_special_tokens, args.init_from
        )
        template = load_template(tokenizer, args.data.template)
        tokenizer.chat_template = template.jinja  # what it is trained on is what it is saved with
        save, load = adapt(model, args, tokenizer, template, training_dtype(args.train, backend.device))
        model.to(backend.device)  # what is frozen is small by now
        broken: dict[Path, list[BadRecord]] = {}
        trained, heldout = read_data(args.data, paths, template, broken, in_pairs)
        unmeasured = check_heldout(args, names, heldout)
        data, eval_data = (pair_batches if in_pairs else batches)(args.data, args.train.seed, trained, heldout)
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
        with alone_in(args.out) if backend.main else nullcontext():
            if backend.main:
                record_run(args.out, "fine_tuning", args, inputs=[path for path in paths if path.is_file()])
                print(describe(args.data, paths, trained, heldout, data), flush=True)
                print(*filter(None, [unmeasured, grown, adapters.describe(model)]), sep="\n", flush=True)
                for path, name in zip(broken, task_names(list(broken))):
                    keep_aside(path, broken[path], args.out / f"broken_{name.replace('/', '_')}.jsonl")
            result = trainer.fit()
            if backend.main:
                print(summary(result), f"Try it: python eval.py --model {result['model']}", sep="\n", flush=True)
            return result


def adapt(
    model: Transformer | TransformersModel, args: Args, tokenizer: Tokenizer, template: ChatTemplate, dtype: torch.dtype
) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """Make the model train as `args` say, with products in `dtype`; returns what puts its trained weights into a
    checkpoint and takes them back: the whole model, or the adapter alone as a PEFT directory."""
    if args.neftune_alpha:
        adapters.neftune(model.embedding, args.neftune_alpha)
    if args.lora.method == "none":
        save = partial(save_model, model=model, tokenizer=tokenizer, stop_ids=template.stop_ids)
        return save, partial(load_weights, model)
    base = args.init_from
    if base.is_symlink():  # `best` may lead to other weights tomorrow
        base = base.parent / base.readlink()
    tree = model.module_tree
    adapters.apply(tree, args.lora, dtype)

    def save_adapter(directory: Path) -> None:
        peft.save(directory, tree, base=str(base))
        tokenizer.save(directory)
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": template.stop_ids}))

    return save_adapter, partial(peft.restore, tree)


def preferring(
    model: Transformer | TransformersModel, args: Args, data: PairData, heldout: PairData | None, backend: SingleProcess
) -> PreferenceModel:
    """The model that learns to prefer, beside its reference, if it has one: itself as it is now."""
    tuned = PreferenceModel(model, make_objective(args.objective, args.preference))
    if tuned.objective.has_reference:
        prepare(tuned, args.train, backend.device)  # in the dtype of the training
        sources = [data] if heldout is None else [data, heldout]
        with backends.use(args.train.attention):
            cache, size = args.out / "reference.npz", args.train.micro_batch_size
            tuned.reference = reference(tuned, sources, backend, cache, size)
    return tuned


def check_heldout(args: Args, names: list[str], heldout: list[Samples] | None) -> str:
    """Which tasks of `names` have no held-out sample, in a sentence, "" if all have; ValueError where the run is led by
    their held-out losses."""
    coba = args.data.loss == "coba"
    if heldout is None and args.train.metric != "loss":
        raise ValueError(f"nothing is held out that --train.metric {args.train.metric} could be measured on")
    if coba and (heldout is None or len(names) < 2):
        raise ValueError(
            "--data.loss coba balances tasks by their held-out losses: it needs two tasks and held-out data"
        )
    without = [name for name, samples in zip(names, heldout or []) if not len(samples)]
    if not without:
        return ""
    told = f"no sample of {', '.join(without)} is held out"
    if coba or args.train.metric in [f"loss/{name}" for name in without]:
        by = "--data.loss coba" if coba else f"--train.metric {args.train.metric}"
        raise ValueError(f"{told}, and {by} goes by it: raise --data.heldout_share, or give files with --data.heldout")
    return f"{told}: what is measured on the way leaves it out"


def balance(
    args: Args,
    data: mixture.Weighted,
    heldout: SFTData,
    model: Transformer | TransformersModel,
    backend: SingleProcess,
    names: list[str],
) -> CoBa:
    """CoBa over the tasks of `data`, measured on one batch of `heldout` after another."""
    keys = [f"loss/{name}" for name in names]

    def measure(number: int) -> list[float]:
        size = args.train.micro_batch_size
        measures = evaluate(model, heldout, None, 1, backend, size, names, first=number)
        return [measures.get(key, math.nan) for key in keys]

    d = args.data
    return CoBa(data, measure, names, d.coba_interval, d.coba_warmup, d.coba_history, d.coba_tau)


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
        "objective": None if args.objective == "sft" else [args.objective, to_plain(args.preference)],
        "optimizer": args.optim.optimizer,
        "lora": None if args.lora.method == "none" else to_plain(args.lora),
        "neftune_alpha": args.neftune_alpha or None,
        "add_tokens": [*args.add_tokens, *args.add_special_tokens] or None,
        "init_from": [file_sha256(path) for path in weight_files(args.init_from)],  # not only where it lies
    }


if __name__ == "__main__":
    run(main, arguments)

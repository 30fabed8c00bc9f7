"""Fine-tune a model on conversations: the loss is on the assistant's words and on the end of each of its turns.

python fine_tuning.py --config configs/tiny.yaml
python fine_tuning.py --init_from DIR --data my_conversations.jsonl --out out/mine

python dataset_sft.py --data my_conversations.jsonl --model DIR shows what of them is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import config
import lora
from chat_template import ChatTemplate, load_template
from checkpoint import load_model, load_weights, save_model, weight_files
from corpora import BadRecord
from dataset_sft import Samples, read_samples
from distributed import make_backend
from foreign import ForeignModel
from model import Transformer
from optim import OptimArgs, build_optimizer
from packing import SFTData
from tokenizer import Tokenizer, load_tokenizer
from trainer import TrainArgs, Trainer


@dataclass(frozen=True)
class DataArgs:
    """Conversations and batches."""

    train: Annotated[Path, tyro.conf.arg(aliases=["--data"])] = Path("data/tiny/sft_train.jsonl")
    """conversations in any of the usual forms (json, jsonl, csv, tsv, parquet, a folder of them, a loader in Python)"""
    heldout: Path | None = None
    """conversations to evaluate on; None: heldout_share of those in train; a missing file: no evaluation"""
    heldout_share: float = 0.02
    """the share of train to evaluate on and not to train, by the hash of the question; 0: no evaluation"""
    template: str = "auto"
    """auto (the model's own, else ours), own, ours, plain, chatml, llama2, mftcoder, or the path of a .jinja file"""
    train_on: Literal["all", "last"] = "all"
    """the answers of a conversation that are trained; one with "loss": false in its record never is"""
    seq_len: int = 128
    """tokens in a row of a batch"""
    batch_size: int = 64
    """rows of an optimizer step, over all processes and micro-batches"""
    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: several samples a row, hidden from each other; none: one a row, padded"""
    too_long: Literal["cut", "drop"] = "cut"
    """what happens to a sample that does not fit a row"""


@dataclass(frozen=True)
class Args:
    """Fine-tune a model, or adapters of it (--lora.method), on conversations."""

    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=lambda: OptimArgs(lr=1e-3, muon_lr=2e-3, schedule="linear"))
    lora: lora.LoraArgs = field(default_factory=lora.LoraArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    neftune_alpha: float = 0.0
    """noise on the embeddings in training (NEFTune, 5 is usual); 0: none"""
    init_from: Path = Path("out/tiny/pretrain/best")
    """the model directory to start from"""
    out: Path = Path("out/tiny/sft")
    """run directory: checkpoints, logs, the resolved config"""


def main(args: Args) -> dict[str, Any]:
    """Train to the end of the schedule; returns the final measures and where the model lies."""
    torch.manual_seed(args.train.seed)
    model = load_model(args.init_from)
    tokenizer = load_tokenizer(args.init_from)
    template = load_template(tokenizer, args.data.template)
    tokenizer.chat_template = template.jinja  # what it is trained on is what it is saved with
    broken: dict[Path, list[BadRecord]] = {}
    samples, heldout = read_data(args.data, template, broken)
    data = SFTData(samples, args.data.seq_len, args.data.batch_size, args.train.seed, args.data.packing)
    eval_data = None
    if heldout is not None:
        eval_data = SFTData(heldout, args.data.seq_len, args.data.batch_size, 0, args.data.packing, shuffle=False)
    with make_backend(args.train.backend, args.train.device, fp16=args.train.dtype == "fp16") as backend:
        model.to(backend.device)
        save, load = adapt(model, args, tokenizer, template)
        trainer = Trainer(
            model,
            build_optimizer(model, args.optim),
            data,
            backend,
            args.train,
            args.optim,
            args.out,
            save=save,
            load=load,
            identity=identity(args, samples, template.jinja),
            eval_data=eval_data,
            token_bytes=tokenizer.token_bytes(),
        )
        if backend.main:
            config.record_run(args.out, "fine_tuning", args, inputs=[args.data.train] * args.data.train.is_file())
            print(describe(args.data, samples, data, heldout), flush=True)
            print(lora.describe(model), flush=True)
            for path, bad in broken.items():
                keep_aside(path, bad, args.out)
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
    data: DataArgs, template: ChatTemplate, broken: dict[Path, list[BadRecord]]
) -> tuple[Samples, Samples | None]:
    """What is trained and what is held out, None if nothing is; the records that are none go to `broken`, by file."""
    read = partial(
        read_samples, template=template, seq_len=data.seq_len, too_long=data.too_long, train_on=data.train_on
    )
    if data.heldout:
        samples = read(data.train, broken=broken.setdefault(data.train, []))
        heldout = read(data.heldout, broken=broken.setdefault(data.heldout, [])) if data.heldout.exists() else None
        return samples, heldout
    if not 0 <= data.heldout_share < 1:
        raise ValueError(f"--data.heldout_share should be from 0 to below 1, found {data.heldout_share}")
    split = {"share": data.heldout_share, "broken": broken.setdefault(data.train, [])}
    samples = read(data.train, held_out=False, **split)
    heldout = read(data.train, held_out=True, **split | {"broken": []}) if data.heldout_share else None
    return samples, heldout if heldout is not None and len(heldout) else None


def keep_aside(path: Path, broken: list[BadRecord], run: Path) -> None:
    """Write the broken records of `path`, if there are any, into the run directory, and say so."""
    if broken:
        aside = run / f"broken_{path.stem}.jsonl"
        aside.write_text("".join(json.dumps(vars(record), ensure_ascii=False) + "\n" for record in broken), "utf8")
        print(f"{path}: {len(broken)} broken records kept aside in {aside}; the first: {broken[0].reason}", flush=True)


def describe(args: DataArgs, samples: Samples, data: SFTData, heldout: Samples | None) -> str:
    """Two lines: what is trained, and on what the model is evaluated."""
    counts = ", ".join(f"{name} {number}" for name, number in samples.stats.items())
    told = f"{args.train}: {counts}; {data.packing_efficiency:.1%} of the positions hold samples"
    if heldout is None:
        why = f"there is no {args.heldout}" if args.heldout else "no conversation is held out"
        return f"{told}\n{why}: nothing is evaluated on the way"
    source = args.heldout or f"{args.heldout_share:.0%} of {args.train}, by the hash of their questions"
    return f"{told}\nheld out to evaluate on: {len(heldout)} samples ({source})"


def identity(args: Args, samples: Samples, jinja: str) -> dict[str, Any]:
    """What fixes the order of the losses, so that a checkpoint is resumed by the same run only."""
    return {
        "seed": args.train.seed,
        "seq_len": args.data.seq_len,
        "batch_size": args.data.batch_size,
        "packing": args.data.packing,
        "samples": samples.stats,
        "template": hashlib.sha256(jinja.encode()).hexdigest(),
        "optimizer": args.optim.optimizer,
        "lora": None if args.lora.method == "none" else config.to_plain(args.lora),
        "neftune_alpha": args.neftune_alpha or None,
        "init_from": [config.file_sha256(path) for path in weight_files(args.init_from)],  # not only where it lies
    }


if __name__ == "__main__":
    config.run(main, Args, "fine_tuning")

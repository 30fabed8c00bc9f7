"""Fine-tune a model on conversations: the loss is on the assistant's words and on the end of each of its turns.

python fine_tuning.py --config configs/tiny.yaml
python fine_tuning.py --init_from DIR --data.train my_conversations.jsonl --out out/mine
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import config
from chat_template import ChatTemplate, load_template
from checkpoint import load_model, load_weights, save_model, weight_files
from conversations import file_conversations
from corpora import BadRecord
from dataset_sft import Samples, encode_samples
from distributed import make_backend
from optim import OptimArgs, build_optimizer
from packing import SFTData
from tokenizer import load_tokenizer
from trainer import TrainArgs, Trainer


@dataclass(frozen=True)
class DataArgs:
    """Conversations and batches."""

    train: Path = Path("data/tiny/sft_train.jsonl")
    """conversations (json, jsonl, csv, tsv or parquet, or a folder of them) in any of the usual key pairs"""
    heldout: Path | None = Path("data/tiny/sft_heldout.jsonl")
    """conversations to evaluate on; None or a missing file: no evaluation"""
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
    """Fine-tune all parameters of a model on conversations."""

    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=lambda: OptimArgs(lr=1e-3, muon_lr=2e-3, schedule="linear"))
    train: TrainArgs = field(default_factory=TrainArgs)
    init_from: Path = Path("out/tiny/pretrain/best")
    """the model directory to start from"""
    out: Path = Path("out/tiny/sft")
    """run directory: checkpoints, logs, the resolved config"""


def main(args: Args) -> dict[str, Any]:
    """Train to the end of the schedule; returns the final measures and where the model lies."""
    torch.manual_seed(args.train.seed)
    model = load_model(args.init_from)
    tokenizer = load_tokenizer(args.init_from)
    template = load_template(tokenizer)
    tokenizer.chat_template = template.jinja  # what it is trained on is what it is saved with
    broken: dict[Path, list[BadRecord]] = {}
    samples = read_samples(args.data.train, template, args, broken)
    data = SFTData(samples, args.data.seq_len, args.data.batch_size, args.train.seed, args.data.packing)
    eval_data = None
    if args.data.heldout and args.data.heldout.exists():
        heldout = read_samples(args.data.heldout, template, args, broken)
        eval_data = SFTData(heldout, args.data.seq_len, args.data.batch_size, 0, args.data.packing, shuffle=False)
    with make_backend(args.train.backend, args.train.device, fp16=args.train.dtype == "fp16") as backend:
        model.to(backend.device)
        trainer = Trainer(
            model,
            build_optimizer(model, args.optim),
            data,
            backend,
            args.train,
            args.optim,
            args.out,
            save=partial(save_model, model=model, tokenizer=tokenizer, stop_ids=template.stop_ids),
            load=partial(load_weights, model),
            identity=identity(args, samples),
            eval_data=eval_data,
            token_bytes=tokenizer.token_bytes(),
        )
        if backend.main:
            config.record_run(args.out, "fine_tuning", args, inputs=[args.data.train] * args.data.train.is_file())
            print(describe(args.data.train, samples, data), flush=True)
            for path, bad in broken.items():
                keep_aside(path, bad, args.out)
            if args.data.heldout and eval_data is None:
                print(f"there is no {args.data.heldout}: nothing is evaluated on the way", flush=True)
        return trainer.fit()


def read_samples(path: Path, template: ChatTemplate, args: Args, broken: dict[Path, list[BadRecord]]) -> Samples:
    """The conversations of `path`, encoded; the records that are none go to `broken[path]`."""
    conversations = file_conversations(path, broken.setdefault(path, []))
    samples = encode_samples(conversations, template, args.data.seq_len, args.data.too_long)
    if not len(samples):
        raise ValueError(
            f"{path}: no conversation has an answer within {args.data.seq_len} tokens; raise --data.seq_len"
        )
    return samples


def keep_aside(path: Path, broken: list[BadRecord], run: Path) -> None:
    """Write the broken records of `path`, if there are any, into the run directory, and say so."""
    if broken:
        aside = run / f"broken_{path.stem}.jsonl"
        aside.write_text("".join(json.dumps(vars(record), ensure_ascii=False) + "\n" for record in broken), "utf8")
        print(f"{path}: {len(broken)} broken records kept aside in {aside}; the first: {broken[0].reason}", flush=True)


def describe(path: Path, samples: Samples, data: SFTData) -> str:
    """One line on what is trained."""
    counts = ", ".join(f"{name} {number}" for name, number in samples.stats.items())
    return f"{path}: {counts}; {data.packing_efficiency:.1%} of the positions hold samples"


def identity(args: Args, samples: Samples) -> dict[str, Any]:
    """What fixes the order of the losses, so that a checkpoint is resumed by the same run only."""
    return {
        "seed": args.train.seed,
        "seq_len": args.data.seq_len,
        "batch_size": args.data.batch_size,
        "packing": args.data.packing,
        "samples": samples.stats,
        "optimizer": args.optim.optimizer,
        "init_from": [config.file_sha256(path) for path in weight_files(args.init_from)],  # not only where it lies
    }


if __name__ == "__main__":
    config.run(main, Args, "fine_tuning")

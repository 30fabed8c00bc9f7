"""Compare full fine-tuning and adapters on the same data and budget: held-out loss, trained share, memory, step time,
file size.

    python bench/finetune.py                                   # the default poet and its questions
    python bench/finetune.py --texts my_texts --data my_chats.jsonl    # pretrain a model on a folder of texts first
    python bench/finetune.py --learn False --widen 512         # costs only, on a wider model of random weights

Every run is `fine_tuning.main`. Losses: each learning rate of a method is tried with the first seed, the other seeds
use the best one. Costs: a new process for each run, one at a time, a few steps, without evaluation. All runs use AdamW,
linear decay, uncompiled. Finished runs are not repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import random
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.extras import need

need("bench/finetune.py", "bench", "psutil", "transformers")
import psutil

import data_process
import fine_tuning
import pretrain
import train_tokenizer
from bench.memory import peak_bytes
from checkpoint.directory import save_model
from cli.record import to_plain
from corpora import BadRecord
from corpora.files import records
from lora.adapters import LoraArgs
from model import Transformer
from model_args import ModelArgs, NewModelArgs
from optim.args import OptimArgs
from tokenizer import load_tokenizer
from training.log import read_metrics
from training.trainer import Diverged, TrainArgs
from tuning.args import DataArgs

METHODS = {
    "full": LoraArgs(),
    "LoRA r=8": LoraArgs("lora", r=8),
    "LoRA r=64": LoraArgs("lora", r=64),
    "rsLoRA r=64": LoraArgs("rslora", r=64),
    "DoRA r=8": LoraArgs("dora", r=8),
    "QLoRA r=8 (nf4)": LoraArgs("lora", r=8, base="nf4"),
    "LoRA r=8 + embed, norm": LoraArgs("lora", r=8, train_embed_norm=True),
}
UNTRAINED = "the model before"


@dataclass(frozen=True)
class Args:
    """Compare ways to fine-tune a model."""

    model: Path = Path("out/tiny/pretrain/best")
    """the model to start from"""
    texts: Path | None = None
    """folder of texts to pretrain the model on first (once: the model is kept below `out`)"""
    pretrain_steps: int = 250
    """optimizer steps of this pretraining"""
    data: Path = Path("data/tiny/sft_train.jsonl")
    """conversations to train on"""
    heldout: Path | None = Path("data/tiny/sft_heldout.jsonl")
    """conversations to measure on; None: a share of `data`"""
    records: int = 4000
    """number of conversations, drawn at random; a tenth as many are held out"""
    steps: int = 100
    """optimizer steps of a run"""
    rows: int = 8
    """rows of a step"""
    seq_len: int = 128
    """tokens in a row"""
    seeds: int = 3
    """number of runs at the best learning rate"""
    full_lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """learning rates to try for full fine-tuning"""
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """learning rates to try for each kind of adapter"""
    rates: Path | None = None
    """results.json of another run, whose best learning rates are used instead of a search"""
    methods: tuple[str, ...] = tuple(METHODS)
    """methods to compare"""
    learn: bool = True
    """measure losses"""
    cost: bool = True
    """measure memory and time"""
    cost_steps: int = 12
    """optimizer steps of a run that measures costs"""
    cost_repeats: int = 3
    """rounds of these runs, in which the methods take turns; the table has medians"""
    widen: int = 0
    """width of a model of 12 layers and random weights to measure the costs on; 0: the model itself"""
    jobs: int = 2
    """parallel runs, one thread each, when losses are measured"""
    threads: int = field(default_factory=torch.get_num_threads)
    """threads of a run when costs are measured"""
    out: Path = Path("out/bench/finetune")
    """directory of runs and results.json"""


@dataclass(frozen=True)
class Job:
    """The name of a method and the arguments of one run."""

    name: str
    args: fine_tuning.Args
    threads: int = 1


# ---- one run


def run(job: Job) -> dict[str, Any]:
    """Fine-tune once; return losses and costs. A run that diverges has an infinite loss."""
    torch.set_num_threads(job.threads)
    job.args.out.mkdir(parents=True, exist_ok=True)
    before = psutil.Process().memory_info().rss
    row: dict[str, Any] = {"name": job.name, "lr": job.args.optim.lr, "seed": job.args.train.seed}
    with (job.args.out / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            row |= fine_tuning.main(job.args)
        except Diverged:
            return row | {"loss": math.inf}
    row["memory_mib"] = (peak_bytes() - before) / 2**20
    counts = re.search(r"([\d,]+) parameters train, ([\d.]+)%", (job.args.out / "log.txt").read_text())
    row |= {"trained": int(counts[1].replace(",", "")), "share": float(counts[2]) / 100}
    rates = [line["tokens_per_second"] for line in read_metrics(job.args.out / "metrics.jsonl") if "mfu" in line]
    row["step_seconds"] = job.args.data.batch_size * job.args.data.seq_len / statistics.median(rates[2:] or rates)
    row["file_kib"] = sum(path.stat().st_size for path in Path(row["model"]).glob("*.safetensors")) / 2**10
    return row


def run_all(jobs: Sequence[Job], at_a_time: int = 1, apart: bool = False) -> list[dict[str, Any]]:
    """Run all jobs, printing a line as each ends; return their rows. apart: each in a process of its own."""
    rows = []
    with multiprocessing.get_context("spawn").Pool(at_a_time, maxtasksperchild=1 if apart else None) as pool:
        for row in pool.imap_unordered(run, jobs, chunksize=1):
            loss = f"loss {row['loss']:.4f}" if "loss" in row else f"{row['step_seconds']:.3f} s a step"
            rows.append(row)
            print(f"{len(rows)}/{len(jobs)} {row['name']}, lr {row['lr']:g}, seed {row['seed']}: {loss}", flush=True)
        pool.close()
        pool.join()
    return rows


def job(args: Args, model: Path, data: tuple[Path, Path], method: str, lr: float, seed: int) -> Job:
    """Return the job of one method, learning rate and seed; a learning rate of 0 measures the untrained model."""
    steps, warmup = (args.steps, args.steps // 10) if lr else (1, 0)
    return placed(
        method,
        fine_tuning.Args(
            data=DataArgs((data[0],), (data[1],), seq_len=args.seq_len, batch_size=args.rows),
            optim=OptimArgs("adamw", lr=lr, schedule="linear", warmup_steps=warmup, weight_decay=0.0),
            lora=METHODS.get(method, LoraArgs()),
            train=TrainArgs(
                max_steps=steps, compile="off", seed=seed, log_interval=2, eval_interval=0, save_interval=0, keep=1
            ),
            init_from=model,
        ),
        args.out / "runs",
    )


def placed(name: str, args: fine_tuning.Args, runs: Path, threads: int = 1) -> Job:
    """Return a job whose run directory depends on all its settings, so that a finished run there is the same one."""
    settings = json.dumps(to_plain(args), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:10]
    return Job(name, replace(args, out=runs / f"{re.sub(r'[^a-zA-Z0-9]+', '_', name)}_{digest}"), threads)


# ---- data and base model


def sampled(path: Path, n: int, out: Path) -> Path:
    """Write n records of `path` to `out`, drawn at random, the same at every call; return `out`."""
    readable = [record.value for record in records(path) if not isinstance(record, BadRecord)]
    drawn = random.Random(0).sample(readable, min(n, len(readable)))
    out.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in drawn), encoding="utf8")
    return out


def conversations(data: Path, heldout: Path | None, n: int, out: Path) -> tuple[Path, Path]:
    """Write n conversations to train on and n / 10 others to measure on, at most all; return the two files."""
    train, test = out / f"{data.stem}.jsonl", out / "heldout" / f"{data.stem}.jsonl"
    test.parent.mkdir(parents=True, exist_ok=True)
    if heldout is not None:
        return sampled(data, n, train), sampled(heldout, n // 10, test)
    lines = sampled(data, n + n // 10, train).read_text(encoding="utf8").splitlines(keepends=True)
    n_test = len(lines) // 11
    test.write_text("".join(lines[:n_test]), encoding="utf8")
    train.write_text("".join(lines[n_test:]), encoding="utf8")
    return train, test


def pretrained(texts: Path, steps: int, out: Path) -> Path:
    """Train a tokenizer, write bins and pretrain a model on a folder of texts; return the directory of the model."""
    if not (out / "model" / "result.json").is_file():
        bins = out / "bins"
        tokenizer = bins / "tokenizer"
        train_tokenizer.main(train_tokenizer.Args(input=(texts,), corpus=(), out=tokenizer, vocab_size=6000))
        data_process.main(data_process.Args(input=(texts,), corpus=(), tokenizer=tokenizer, out=bins, overwrite=True))
        pretrain.main(
            pretrain.Args(
                model=NewModelArgs(dim=128, n_layers=6, n_heads=4, max_seq_len=256),
                data=pretrain.DataArgs(dir=bins, seq_len=128, batch_size=32),
                optim=OptimArgs("muon", lr=4e-3, muon_lr=6e-3, schedule="wsd", decay_share=0.5),
                train=TrainArgs(max_steps=steps, eval_interval=0),
                out=out / "model",
            )
        )
    return out / "model" / "best"


def widened(model: Path, dim: int, out: Path) -> Path:
    """Save a model of random weights, `dim` wide, with the tokenizer of `model`; return its directory `out`."""
    tokenizer = load_tokenizer(model)
    torch.manual_seed(0)
    shape = ModelArgs(dim=dim, n_layers=12, n_heads=dim // 64, vocab_size=tokenizer.vocab_size, max_seq_len=512)
    save_model(out, Transformer(shape), tokenizer)
    return out


# ---- the tables


def learn(args: Args, model: Path, data: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    """Return held-out losses by method: of the untrained model, of every learning rate, of every seed at the best."""
    lrs = {method: args.full_lrs if method == "full" else args.lrs for method in args.methods}
    if args.rates is not None:
        earlier = json.loads(args.rates.read_text())["losses"]
        if missing := [method for method in args.methods if method not in earlier]:
            raise ValueError(f"{args.rates} has no learning rate for {', '.join(missing)}")
        lrs = {method: [earlier[method]["lr"]] for method in args.methods}
    tries = [job(args, model, data, UNTRAINED, 0.0, 0)]
    tries += [job(args, model, data, method, lr, 0) for method in args.methods for lr in lrs[method]]
    table: dict[str, dict[str, Any]] = {}
    for row in run_all(tries, args.jobs):
        table.setdefault(row["name"], {"by_lr": {}})["by_lr"][row["lr"]] = row["loss"]
    more = []
    for method, losses in table.items():
        losses["lr"] = min(losses["by_lr"], key=losses["by_lr"].get)
        losses["losses"] = [losses["by_lr"][losses["lr"]]]
        more += [job(args, model, data, method, losses["lr"], seed) for seed in range(1, args.seeds) if losses["lr"]]
    for row in run_all(more, args.jobs):
        table[row["name"]]["losses"].append(row["loss"])
    return {name: table[name] for name in (UNTRAINED, *args.methods)}


def costs(args: Args, model: Path, data: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    """Return for each method trained parameters, memory, step time and file size, medians of all rounds.

    memory: peak less the resident memory before the run, in MiB.
    """
    jobs = []
    for method in args.methods:
        each = job(args, model, data, method, 1e-3, 0).args
        each = replace(
            each,
            data=replace(each.data, heldout=(Path("none"),)),
            train=replace(each.train, max_steps=args.cost_steps, resume="never"),
        )
        jobs.append(placed(method, each, args.out / "runs", args.threads))
    names = ("trained", "share", "memory_mib", "step_seconds", "file_kib")
    rows = run_all(jobs * args.cost_repeats, apart=True)
    table = {}
    for method in args.methods:
        rounds = [row for row in rows if row["name"] == method]
        table[method] = {name: statistics.median(row[name] for row in rounds) for name in names}
    return table


def markdown(args: Args, losses: dict[str, dict[str, Any]], cost: dict[str, dict[str, Any]]) -> str:
    """Return losses and costs as one Markdown table."""
    heads = ["held-out loss", "from", "to", "learning rate"] * bool(losses)
    heads += ["trained", "share", "memory, MiB", "step, ms", "file, KiB"] * bool(cost)
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in losses or cost:
        cells = []
        if losses:
            values, lr = losses[name]["losses"], losses[name]["lr"]
            tried = losses[name]["by_lr"]
            edge = "*" * (len(tried) > 1 and lr in (min(tried), max(tried)))
            spread = [f"{min(values):.4f}", f"{max(values):.4f}", f"{lr:g}{edge}"] if lr else ["", "", ""]
            cells += [f"{statistics.mean(values):.4f}", *spread]
        if name in cost:
            c = cost[name]
            cells += [f"{c['trained']:,.0f}", f"{c['share']:.2%}", f"{c['memory_mib']:.0f}"]
            cells += [f"{1000 * c['step_seconds']:.0f}", f"{c['file_kib']:,.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells + [""] * (len(heads) - len(cells))) + " |")
    return "\n".join(lines)


def main(args: Args) -> dict[str, Any]:
    """Measure, print a Markdown table, write results.json."""
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model if args.texts is None else pretrained(args.texts, args.pretrain_steps, args.out / "base")
    if not (model / "config.json").is_file():
        advice = "`python pretrain.py --config configs/tiny.yaml` makes the default one"
        raise FileNotFoundError(f"there is no model at {model}; {advice}, after `bash run.sh` has made its data")
    data = conversations(args.data, args.heldout, args.records, args.out)
    losses = learn(args, model, data) if args.learn else {}
    cost = {}
    if args.cost:
        cost = costs(args, widened(model, args.widen, args.out / "wide") if args.widen else model, data)
    print(
        f"\n{args.steps} steps of {args.rows} x {args.seq_len} tokens, {args.seeds} seeds; * the rate is at an edge\n"
    )
    print(markdown(args, losses, cost))
    results = {"losses": losses, "cost": cost}
    (args.out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf8")
    return results


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, config=(tyro.conf.FlagConversionOff,)))

"""A training run small enough to do over and over: a bin whose next token is easy to learn, a model of a few thousand
parameters, and the trainer that puts them together."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bins.token_bin import BinWriter, TokenBin
from checkpoint import directory, sharded
from dataset import Batch, PretrainData
from distributed.backend import make_backend
from model import Transformer
from model_args import ModelArgs
from optim.args import OptimArgs
from optim.optimizers import build_optimizer
from training import log as training_log
from training import trainer
from training.backend import options_of
from training.log import read_metrics
from training.trainer import TrainArgs, Trainer

VOCAB = 29
EOS = 2
# an epsilon this large keeps AdamW from blowing up the last bit of small gradients
SMOOTH = OptimArgs(optimizer="adamw", lr=0.01, eps=0.01, warmup_steps=3)
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": VOCAB, "multiple_of": 8}

OF_TRAINER = ("eval_data", "token_bytes", "identity", "group_names", "adaptive")


def toy_bin(folder: Path, name: str = "train", documents: int = 60, seed: int = 0) -> TokenBin:
    """Documents that count upwards in steps of three, from anywhere, for a while."""
    rng = np.random.default_rng(seed)
    with BinWriter(folder / name, VOCAB, EOS, "toy") as writer:
        for _ in range(documents):
            start, length = rng.integers(0, VOCAB - 3), rng.integers(3, 30)
            writer.add([int((start + 3 * i) % (VOCAB - 3)) + 3 for i in range(length)] + [EOS])
    return TokenBin(folder / f"{name}.bin")


def toy_trainer(
    run: Path, data: Any, optim: OptimArgs | None = None, shape: dict | None = None, **changes: Any
) -> Trainer:
    """A trainer of a fresh toy model under `run`; `changes` are fields of TrainArgs or arguments of Trainer;
    `use_backend`: a backend in place of the one that they name."""
    backend = changes.pop("use_backend", None)
    ours = {name: changes.pop(name) for name in OF_TRAINER if name in changes}
    args = TrainArgs(**{"dtype": "fp32", "compile": "off", "device": "cpu", "log_interval": 1} | changes)
    optim = optim or OptimArgs(lr=0.01, muon_lr=0.01, warmup_steps=3)
    model = Transformer(ModelArgs(**SHAPE | (shape or {})))
    return Trainer(
        model,
        build_optimizer(model, optim),
        data,
        backend or make_backend(args.backend, args.device, options_of(args, data.batch_size)),
        args,
        optim,
        run,
        save=partial(directory.save_model, model=model),
        load=partial(directory.load_weights, model),
        shards=sharded.saver_of(model),
        **{"identity": {"seed": 0}} | ours,
    )


def toy_data(folder: Path, **changes: Any) -> PretrainData:
    """Batches of 6 rows of 16 tokens over a toy bin in `folder`."""
    bins = [toy_bin(folder)]
    return PretrainData(bins, **{"seq_len": 16, "batch_size": 6, "seed": 0} | changes)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Neither half a second for the rate of matrix products nor one for the picture, in every run."""
    monkeypatch.setattr(trainer, "peak_flops", lambda *_: (1e12, "not measured"))
    monkeypatch.setattr(training_log, "draw_losses", lambda *_: None)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def rows(run: Path) -> list[dict]:
    """The rows of the log that do not depend on the clock."""
    return [row for row in read_metrics(run / "metrics.jsonl") if "mfu" not in row]


@dataclasses.dataclass
class Changed:
    """A batch source whose batches go through `change(step, batch)`."""

    source: PretrainData
    change: object

    def __getattr__(self, name):
        return getattr(self.source, name)

    def batch(self, step, rank=0, world=1) -> Batch:
        return self.change(step, self.source.batch(step, rank, world))


def weighted(bad_steps) -> object:
    """A change that makes the loss of some steps infinite."""

    def change(step, batch):
        value = math.inf if step in bad_steps else 1.0
        return dataclasses.replace(batch, loss_weights=torch.full(batch.tokens.shape, value))

    return change

"""A training run small enough to do over and over: a bin whose next token is easy to learn, a model of a few thousand
parameters, and the trainer that puts them together."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import checkpoint
from bins import BinWriter, TokenBin
from dataset import PretrainData
from distributed import make_backend
from model import ModelArgs, Transformer
from optim import OptimArgs, build_optimizer
from trainer import TrainArgs, Trainer

VOCAB = 29
EOS = 2
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": VOCAB, "multiple_of": 8}


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
    """A trainer of a fresh toy model under `run`; `changes` are fields of TrainArgs or arguments of Trainer."""
    ours = {name: changes.pop(name) for name in ("eval_data", "token_bytes", "identity") if name in changes}
    args = TrainArgs(**{"dtype": "fp32", "compile": "off", "device": "cpu", "log_interval": 1} | changes)
    optim = optim or OptimArgs(lr=0.01, muon_lr=0.01, warmup_steps=3)
    model = Transformer(ModelArgs(**SHAPE | (shape or {})))
    return Trainer(
        model,
        build_optimizer(model, optim),
        data,
        make_backend(args.backend, args.device, fp16=args.dtype == "fp16"),
        args,
        optim,
        run,
        save=partial(checkpoint.save_model, model=model),
        load=partial(checkpoint.load_weights, model),
        **{"identity": {"seed": 0}} | ours,
    )


def toy_data(folder: Path, **changes: Any) -> PretrainData:
    """Batches of 6 rows of 16 tokens over a toy bin in `folder`."""
    bins = [toy_bin(folder)]
    return PretrainData(bins, **{"seq_len": 16, "batch_size": 6, "seed": 0} | changes)

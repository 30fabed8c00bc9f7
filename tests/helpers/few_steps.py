"""Arguments of a pretraining of a few steps on one text, for weights that are trained in few bits."""

from pathlib import Path
from typing import Any

import pretrain
from bins.token_bin import BinWriter
from helpers.tiny_chat_model import TEXT, chat_tokenizer
from model_args import NewModelArgs
from optim.args import OptimArgs
from training.args import TrainArgs


def few_steps(folder: Path, dim: int, hidden_dim: int, **settings: Any) -> pretrain.Args:
    """Write bins below `folder`; return arguments with `settings` that train a model of these widths on them."""
    (folder / "data/tokenizer").mkdir(parents=True)
    tokenizer = chat_tokenizer(folder / "data")
    tokenizer.save(folder / "data/tokenizer")
    for name in ("train", "heldout"):
        with BinWriter(folder / "data" / name, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.sha256()) as writer:
            for _ in range(20):
                writer.add([*tokenizer.encode(TEXT), tokenizer.eos_id])
    return pretrain.Args(
        model=NewModelArgs(dim=dim, n_layers=2, n_heads=2, hidden_dim=hidden_dim, max_seq_len=64),
        data=pretrain.DataArgs(dir=folder / "data", seq_len=32, batch_size=4),
        optim=OptimArgs(lr=1e-2, warmup_steps=1),
        train=TrainArgs(max_steps=6, device="cpu", dtype="fp32", eval_interval=6, log_interval=1),
        out=folder / "run",
        **settings,
    )

"""Set how a model computes in training: dtype, attention, recomputation, compilation."""

from __future__ import annotations

import torch

from attention import backends
from attention.shifted_sparse import ShiftedSparse
from hardware import DTYPES, can_compile, has_bfloat16
from model import Transformer
from training.args import TrainArgs
from training.protocols import TrainableModel


def check_length(seq_len: int, model: TrainableModel) -> None:
    """Raise ValueError for rows of more tokens than the model has positions for."""
    if seq_len > model.args.max_seq_len:
        raise ValueError(
            f"--data.seq_len {seq_len} is longer than the model's max_seq_len {model.args.max_seq_len}: shorten the "
            f"rows, or train from scratch with --model.max_seq_len {seq_len}; a trained model is extended by "
            f"pretrain.py --init_from DIR --model.max_seq_len {seq_len}"
        )


def training_dtype(args: TrainArgs, device: torch.device) -> torch.dtype:
    """Return the dtype of activations and matrix products."""
    return DTYPES.get(args.dtype) or (torch.bfloat16 if has_bfloat16(device) else torch.float32)


def compiles(args: TrainArgs, device: torch.device) -> bool:
    """Return whether models are compiled."""
    return args.compile == "on" or (args.compile == "auto" and can_compile(device))


def prepare(model: TrainableModel, args: TrainArgs, device: torch.device) -> torch.dtype:
    """Set precision, attention, checkpointing and compilation of a model on its device; return the dtype of its
    activations. Raises ValueError where the requested attention cannot run here."""
    torch.set_float32_matmul_precision(args.float32_matmul)
    dtype = training_dtype(args, device)
    backends.check(args.attention, dtype, device, training=True)
    if args.s2_group:
        if not isinstance(model, Transformer) or model.args.n_heads < 2:
            raise ValueError(
                "--train.s2_group needs a LLaMA with two heads or more, since it shifts half of them: remove it"
            )
        model.shifted_sparse = ShiftedSparse(args.s2_group, args.s2_min_len)
    model.to(device)
    model.train()
    model.compute_dtype = dtype
    model.gradient_checkpointing = args.gradient_checkpointing
    if compiles(args, device):
        model.compile()
    return dtype

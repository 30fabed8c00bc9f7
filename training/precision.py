"""How a model computes in training: dtype, attention, recomputation, compilation."""

from __future__ import annotations

import torch

from attention import backends
from attention.shifted_sparse import ShiftedSparse
from hardware import DTYPES, can_compile, has_bfloat16
from model import Transformer
from training.args import TrainArgs


def check_length(seq_len: int, model: Transformer) -> None:
    """Raise ValueError for rows that are longer than what `model` has positions for."""
    if seq_len > model.args.max_seq_len:
        raise ValueError(
            f"seq_len {seq_len} is longer than the model's max_seq_len {model.args.max_seq_len}; "
            "shorten the rows, or make a model for longer ones: pretrain.py --init_from with --model.max_seq_len"
        )


def training_dtype(args: TrainArgs, device: torch.device) -> torch.dtype:
    """The dtype of activations and matrix products."""
    return DTYPES.get(args.dtype) or (torch.bfloat16 if has_bfloat16(device) else torch.float32)


def prepare(model: Transformer, args: TrainArgs, device: torch.device) -> torch.dtype:
    """Set precision, attention, checkpointing and compilation of a model on its device; returns the dtype of its
    activations. Raises ValueError where the attention that is asked for cannot be had."""
    torch.set_float32_matmul_precision(args.float32_matmul)
    dtype = training_dtype(args, device)
    backends.check(args.attention, dtype, device, training=True)
    if args.s2_group:
        if not isinstance(model, Transformer) or model.args.n_heads < 2:
            raise ValueError("--train.s2_group shifts half of the heads: it needs a LLaMA with two heads or more")
        model.shifted_sparse = ShiftedSparse(args.s2_group, args.s2_min_len)
    model.to(device)
    model.train()
    model.compute_dtype = dtype
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.compile == "on" or (args.compile == "auto" and can_compile(device)):
        model.compile()  # in place: parameters keep their names
    return dtype

"""Set how a model computes in training: dtype, attention, recomputation, compilation."""

from __future__ import annotations

import torch

from attention import backends
from attention.shifted_sparse import ShiftedSparse
from dataset import BatchSource, check_division
from distributed.single import SingleProcess
from distributed.split import check_rows, check_shape
from hardware import DTYPES, can_compile, exact_float32_matmul, has_bfloat16
from model import Transformer
from training.args import TrainArgs
from training.flops import run_flops
from training.protocols import TrainableModel

# On two cores: what compiling takes, the share of a step that it saves (docs/speed.md), and the rate without it.
SECONDS_A_LAYER, COMPILED_SAVES, CPU_FLOPS = 10.0, 0.3, 6e10


def check_length(seq_len: int, model: TrainableModel) -> None:
    """Raise ValueError for rows of more tokens than the model has positions for."""
    if seq_len > model.args.max_seq_len:
        raise ValueError(
            f"--data.seq_len {seq_len} is longer than the model's max_seq_len {model.args.max_seq_len}: shorten the "
            f"rows, or train from scratch with --model.max_seq_len {seq_len}; a trained model is extended by "
            f"pretrain.py --init_from DIR --model.max_seq_len {seq_len}"
        )


def check_data(model: TrainableModel, args: TrainArgs, data: BatchSource, backend: SingleProcess) -> None:
    """Raise ValueError for rows that are too long, for a step whose rows do not divide over the ranks, and for a model
    or rows that --train.tp and --train.pp cannot divide."""
    check_length(data.seq_len, model)
    check_division(data.batch_size, backend.data_world)  # here, before a run in the same directory is replaced
    if max(args.tp, args.pp) == 1:
        return
    if not isinstance(model, Transformer):
        raise ValueError(
            "--train.tp and --train.pp need a model of the LLaMA family, and no pairs of answers: remove them"
        )
    check_shape(model.args, args.tp, args.pp)
    padded = getattr(data, "packing", None) in ("bucket", "none")
    rows = data.batch_size // backend.data_world
    check_rows(args.tp, args.pp, data.seq_len, padded, rows, args.micro_batch_size)


def training_dtype(args: TrainArgs, device: torch.device) -> torch.dtype:
    """Return the dtype of activations and matrix products."""
    return DTYPES.get(args.dtype) or (torch.bfloat16 if has_bfloat16(device) else torch.float32)


def compiles(model: TrainableModel, args: TrainArgs, device: torch.device, data: BatchSource) -> bool:
    """Return whether a model is compiled to train on `data`.

    The whole run counts, and no measured rate does: a run that goes on decides as it did before, for the same losses.
    """
    if max(args.tp, args.pp) > 1:  # not tried
        return False
    pays = device.type != "cpu" or compile_seconds(model) < saved_seconds(model, args, data)
    return args.compile == "on" or (args.compile == "auto" and pays and can_compile(device))


def compile_seconds(model: TrainableModel) -> float:
    """Return about how long torch.compile takes on two idle CPU cores, in seconds."""
    return SECONDS_A_LAYER * model.args.n_layers


def saved_seconds(model: TrainableModel, args: TrainArgs, data: BatchSource) -> float:
    """Return by about how many seconds a compiled run is shorter on two idle CPU cores, compiling not counted."""
    seconds = run_flops(model.args, data, args) / CPU_FLOPS
    return COMPILED_SAVES * (min(seconds, 60 * args.max_minutes) if args.max_minutes else seconds)


def about_compiling(model: TrainableModel, args: TrainArgs, device: torch.device, data: BatchSource) -> str | None:
    """Return a sentence on whether a run is compiled and what that takes or saves; None where it was turned off."""
    takes, saves = compile_seconds(model), saved_seconds(model, args, data)
    if compiles(model, args, device, data):
        return f"The first step compiles the model: about {takes:,.0f} s on two idle cores."
    if args.compile == "off" or max(args.tp, args.pp) > 1:
        return None
    if device.type == "cpu" and takes >= saves:
        return (
            f"Not compiled: on two idle cores compiling takes about {takes:,.0f} s, and would save about "
            f"{saves:,.0f} s of the run."
        )
    needs = {"cpu": "a C++ compiler", "cuda": "Triton, a C compiler"}.get(device.type)
    if needs is None:
        return None  # torch.compile is not tried on this device
    saving = (
        f"; it would save about {saves - takes:,.0f} s of the run on two idle cores" if device.type == "cpu" else ""
    )
    return f"Not compiled: torch.compile needs {needs} and Python's headers, and not all of that is here{saving}."


def float32_products(args: TrainArgs, dtype: torch.dtype, backend: SingleProcess) -> str:
    """Return the way to compute float32 products, the same on all ranks."""
    if args.float32_matmul != "auto":
        return args.float32_matmul
    if dtype != torch.float32:  # they take no time then
        return "highest"
    return backend.gather(exact_float32_matmul(backend.device) if backend.main else None)[0]


def prepare(model: TrainableModel, args: TrainArgs, backend: SingleProcess, data: BatchSource) -> torch.dtype:
    """Set precision, attention, checkpointing and compilation of a model on its device; return the dtype of its
    activations. data: what it trains on. Raises ValueError where the requested attention cannot run here."""
    device = backend.device
    dtype = training_dtype(args, device)
    torch.set_float32_matmul_precision(float32_products(args, dtype, backend))
    backends.check(args.attention, dtype, device, training=True)
    if args.s2_group:
        if not isinstance(model, Transformer) or model.args.n_heads < 2:
            raise ValueError(
                "--train.s2_group needs a LLaMA with two heads or more, since it shifts half of them: remove it"
            )
        model.shifted_sparse = ShiftedSparse(args.s2_group, args.s2_min_len)
    if args.z_loss:
        if not isinstance(model, Transformer):
            raise ValueError("--train.z_loss needs a LLaMA and a loss of tokens (no pairs of answers): remove it")
        model.z_loss = args.z_loss
    backend.place(model)
    model.train()
    model.compute_dtype = dtype
    model.gradient_checkpointing = args.gradient_checkpointing
    if compiles(model, args, device, data):
        backend.compile(model)
    return dtype

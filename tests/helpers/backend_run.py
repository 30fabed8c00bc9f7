"""A toy run on one backend, as test_distributed_backends.py and tests/backends.py start it, alone or under torchrun:

    backend_run.py FOLDER '{"name": "a", "backend": "fsdp", ...}' ...

Each JSON object (fields of `Case`) is one run in FOLDER/NAME; the numbers of its steps go to FOLDER/NAME.json. Cases
with other tp, pp or backend are other backends over the same processes.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import optim.muon
from chat.samples import Samples
from checkpoint import directory, peft, sharded
from dataset import Batch, BatchSource
from dataset_sft import PairData, SFTData
from distributed.backend import make_backend
from distributed.group import ProcessGroup
from distributed.single import SingleProcess
from helpers.tiny_training_run import SHAPE, VOCAB, Changed, toy_data
from lora import adapters
from lora.spec import LoraArgs
from model import Transformer
from model_args import ModelArgs
from optim.args import OptimArgs
from optim.optimizers import build_optimizer
from training import guards, log, precision, state, trainer
from training.args import TrainArgs
from training.backend import options_of
from training.state import TrainState
from training.trainer import Trainer
from tuning.args import PreferenceArgs
from tuning.objectives import make_objective

# an epsilon this large keeps AdamW from blowing up the last bit of small gradients
EPS = 0.01
ADD = TrainState.add


@dataclasses.dataclass
class Case:
    """One run."""

    name: str
    backend: str = "single"
    data: str = "bin"  # bin: rows of 16 tokens; ragged: one sample a row, of unequal lengths, with few targets
    count: int = 68  # samples of `ragged`; the last of the 9 steps of an epoch has half of its rows
    micro: int = 0  # rows of a micro-batch; 0: all rows of a rank
    wide: bool = False  # float64, also in Muon's iteration
    optimizer: str = "adamw"
    steps: int = 9
    stop: int = 0  # step after which every rank gets a SIGTERM; 0: never
    die: int = 0  # step after which rank 1 gets a SIGKILL; 0: never
    hang: int = 0  # step after which rank 1 waits for ever; 0: never
    shape: dict = dataclasses.field(default_factory=dict)
    train: dict = dataclasses.field(default_factory=dict)  # more fields of TrainArgs
    lora: dict = dataclasses.field(default_factory=dict)  # fields of LoraArgs
    dpo: bool = False  # pairs of answers
    bad: list = dataclasses.field(default_factory=list)  # steps in which the loss of the last row, on one rank, is inf
    empty: bool = False  # the model has no weights before the backend draws them
    grouped: bool = False  # the loss at the end is that of a group which has all targets


class OneBadRow(Changed):
    """Batches whose last row, which only the last rank has, has an infinite loss in the steps `change`."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        batch = self.source.batch(step, rank, world)
        weights = torch.ones(batch.tokens.shape)
        if step in self.change and rank == world - 1:
            weights[-1] = math.inf
        return dataclasses.replace(batch, loss_weights=weights)


def samples(count: int) -> Samples:
    """Samples of unequal lengths, the last quarter or half of each a target."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, count)
    ids = [(rng.integers(VOCAB) + 3 * np.arange(n)) % VOCAB for n in lengths]
    mask = np.concatenate([np.arange(n) >= n - max(1, n // rng.integers(2, 5)) for n in lengths])
    return Samples(np.concatenate(ids).astype(np.int32), mask, np.cumsum([0, *lengths]).astype(np.uint64), {})


def make_data(folder: Path, case: Case) -> BatchSource:
    """The batches of a case, 8 rows each."""
    if case.dpo:
        return PairData(samples(80), 40, 8, 0, packing="none")
    if case.data == "ragged":
        return SFTData(samples(case.count), 40, 8, 0, packing="none")
    return toy_data(folder / f"data{os.environ.get('RANK', '0')}", batch_size=8)


def make(folder: Path, case: Case, backend: SingleProcess) -> Trainer:
    """The trainer of a case."""
    torch.manual_seed(0)
    data = make_data(folder, case)
    train = OneBadRow(data, set(case.bad)) if case.bad else data
    changes = {"max_steps": case.steps, "micro_batch_size": case.micro, "save_interval": 3, "keep": 20}
    changes |= {"dtype": "fp32", "compile": "off", "device": "cpu", "log_interval": 1}
    changes |= {"eval_interval": 4, "eval_batches": 2, "grad_clip": 0.2, "backend": case.backend}
    args = TrainArgs(**changes | case.train)
    optim = OptimArgs(optimizer=case.optimizer, lr=0.01, muon_lr=0.01, eps=EPS, warmup_steps=3)
    with torch.device("meta" if case.empty else "cpu"):
        shape = ModelArgs(**SHAPE | {"n_layers": 3, "max_seq_len": 80} | case.shape)
        model = Transformer(shape, initialize=not case.empty)
    model = model.double() if case.wide else model
    save, load = partial(directory.save_model, model=model), partial(directory.load_weights, model)
    if case.lora:
        for p in model.parameters():  # an adapter of a model that knows nothing would have small gradients
            torch.nn.init.normal_(p, mean=p.dim() == 1, std=0.2)
        adapters.apply(model, LoraArgs(**case.lora), model.dtype)
        save, load = partial(peft.save, model=model, base="base"), partial(peft.restore, model)
    trained = model
    if case.dpo:
        wrap = make_objective("dpo", PreferenceArgs()).wrap
        trained = wrap(model, [data], backend, args, folder / f"{case.name}.npz")
    optimizer = build_optimizer(model, optim)
    run, identity = folder / case.name, {"seed": 0}
    everything = {"save": save, "load": load, "identity": identity, "eval_data": data}
    everything["shards"] = sharded.saver_of(model)
    everything["group_names"] = ("all",) if case.grouped else ()
    return Trainer(trained, optimizer, train, backend, args, optim, run, **everything)


def orthogonalize_wide(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Muon's iteration in the dtype of the matrices: in bfloat16 the order of a sum alone would move its result."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def run(folder: Path, case: Case, backend: SingleProcess) -> None:
    """Train; write FOLDER/NAME.json with the loss, the rate, the norm and the number of targets of every step."""
    trainer.peak_flops = lambda *_: (1e12, "not measured")
    log.draw_losses = lambda *_: None
    if case.wide:
        precision.DTYPES = {"fp32": torch.float64}
        optim.muon.orthogonalize = orthogonalize_wide
    if case.bad:
        guards.MOST_SKIPPED = state.MOST_SKIPPED = 3
    ours = make(folder, case, backend)
    steps: list = []

    def recorded(own: TrainState, norm: float, n_tokens: int, n_targets: int, loss: float, *more: Any) -> None:
        steps.append([loss / n_targets, ours.optimizer.param_groups[0]["lr"], norm, n_targets])
        ADD(own, norm, n_tokens, n_targets, loss, *more)
        if case.stop and ours.state.step == case.stop:
            ours.signals.append(signal.SIGTERM)
        if backend.rank == 1 and ours.state.step == case.die:
            os.kill(os.getpid(), signal.SIGKILL)
        if backend.rank == 1 and ours.state.step == case.hang:
            time.sleep(1000)

    TrainState.add = recorded
    trainer.sum_of_losses = lambda outputs: sum(loss.item() for loss, _ in outputs)  # not rounded to float32
    try:
        result = ours.fit()
    except SystemExit:
        result = {}
    inner = ours.model.model if case.dpo else ours.model
    with backend.all_modules(inner) if case.train.keys() & {"tp", "pp"} else contextlib.nullcontext():
        tied = inner.lm_head.weight is inner.model.embed_tokens.weight
    if ours.backend.main:
        guarded = [ours.state.rollbacks, ours.state.avoid, sorted(path.name for path in ours.run.glob("guards/*"))]
        found = {"steps": steps, "tied": tied, "loss": result.get("loss/all", result.get("loss")), "guards": guarded}
        (folder / f"{case.name}.json").write_text(json.dumps(found))


def key(case: Case) -> tuple:
    """What the backend of a case depends on."""
    return case.backend, case.train.get("tp"), case.train.get("pp"), case.train.get("pp_schedule")


def backend_of(case: Case) -> SingleProcess:
    """The backend of a case."""
    flags = TrainArgs(**{"grad_clip": 0.2} | case.train)
    return make_backend(case.backend, "cpu", options_of(flags, batch_size=8))


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [Case(**json.loads(text)) for text in sys.argv[2:]]
    with backend_of(cases[0]) as first:
        ProcessGroup.join = lambda *_: None  # the others have the group of the first
        backends = {key(cases[0]): first}
        for case in cases:
            backend = backends[key(case)] = backends.get(key(case)) or backend_of(case)
            run(Path(sys.argv[1]), case, backend)
            backend.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter while it ends, after all has been written

"""What test_tasks_distributed.py starts under torchrun, and itself runs alone: `two_process_task_run.py RUN LOSS`."""

import sys
from pathlib import Path

import numpy as np
import torch

from chat.samples import Samples
from dataset_sft import SFTData
from helpers.tiny_training_run import SMOOTH, VOCAB, toy_trainer
from training.heldout import evaluate
from training.trainer import Trainer
from tuning import balance, mixture

NAMES = ["up", "down", "rare"]


def samples(seed: int) -> tuple[Samples, np.ndarray]:
    """Counting upwards, counting downwards, and a few of nothing but one id; the answers of unequal lengths."""
    rng = np.random.default_rng(seed)
    groups = rng.choice(3, 50, p=[0.5, 0.4, 0.1])
    lengths = rng.integers(3, 16, 50)
    ids = [(9 + np.arange(n) * (1, -1, 0)[k]) % VOCAB for n, k in zip(lengths, groups)]
    mask = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    return Samples(np.concatenate(ids).astype(np.int32), mask, np.cumsum([0, *lengths]).astype(np.uint64), {}), groups


def make(run: Path, loss: str, backend: str) -> Trainer:
    """A trainer of three tasks with everything that needs to know the whole step."""
    torch.manual_seed(0)
    train, groups = samples(0)
    heldout, of_heldout = samples(1)
    per_sample = loss == "task_sample"
    data = mixture.Weighted(SFTData(train, 24, 8, 0, groups=groups, per_sample=per_sample), [1.0, 1.0, 1.0])
    eval_data = SFTData(heldout, 24, 8, 0, groups=of_heldout)
    changes = {"group_names": NAMES, "eval_data": eval_data, "backend": backend, "micro_batch_size": 3, "max_steps": 8}
    ours = toy_trainer(run, data, SMOOTH, {"max_seq_len": 24}, eval_interval=3, metric="loss/rare", **changes)
    if loss == "coba":

        def measure(number: int) -> list[float]:
            measures = evaluate(ours.model, eval_data, None, 1, ours.backend, 0, NAMES, number)
            return [measures.get(f"loss/{name}", float("nan")) for name in NAMES]

        ours.adaptive = balance.CoBa(data, measure, NAMES, warmup=3, history=4)
    return ours


if __name__ == "__main__":
    torch.set_num_threads(1)
    ours = make(Path(sys.argv[1]), sys.argv[2], "ddp")
    with ours.backend:
        ours.fit()

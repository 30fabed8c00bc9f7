"""Four ranks on two shares of the data, against one process: who trains on what, and who takes part in saving."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.thread_ranks import Exchange, ThreadRank, on_every_rank
from helpers.tiny_training_run import SMOOTH, quick, rows, toy_data, toy_trainer  # noqa: F401

from checkpoint.directory import load_model
from dataset import Batch, PretrainData
from training.heldout import evaluate
from training.state import checkpoints, load_state
from tuning import reference as reference_room

CHANGES = {"max_steps": 8, "save_interval": 3, "eval_interval": 4, "micro_batch_size": 2, "keep": 9}


@dataclasses.dataclass
class Recorded:
    """A batch source that records which share of which step it was asked for."""

    source: PretrainData
    shares: list

    def __getattr__(self, name):
        return getattr(self.source, name)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        self.shares.append((rank, world))
        return self.source.batch(step, rank, world)


def fit(run: Path, data: PretrainData, weights: dict, rank: int, exchange: Exchange, **changes):
    """Train as one of the ranks, from `weights`; return its backend and the shares of the data that it took."""
    shares: list = []
    backend = ThreadRank(rank, exchange)
    source = Recorded(data, shares)
    ours = toy_trainer(run, source, SMOOTH, eval_data=source, use_backend=backend, **CHANGES | changes)
    ours.model.load_state_dict(weights)  # threads draw from one random generator
    ours.fit()
    return backend, shares


@pytest.fixture
def four(tmp_path):
    """A run of four ranks, and the same run of one process beside it."""
    data = toy_data(tmp_path, batch_size=8)
    ours = toy_trainer(tmp_path / "one", data, SMOOTH, eval_data=data, **CHANGES)
    weights = {name: value.clone() for name, value in ours.model.state_dict().items()}
    ours.fit()
    ranks = on_every_rank(lambda rank, exchange: fit(tmp_path / "four", data, weights, rank, exchange), 4)
    return tmp_path, data, weights, ranks


def test_batches_go_by_data_rank_in_training_and_evaluation(four):
    folder, _, _, ranks = four
    for rank, (_, shares) in enumerate(ranks):
        assert set(shares) == {(rank // 2, 2)}
    assert len(rows(folder / "one")) == 8 + 2
    for one, all_four in zip(rows(folder / "one"), rows(folder / "four"), strict=True):
        assert all_four == pytest.approx(one, rel=1e-6)  # float32 with another order of sums


def test_every_rank_takes_part_in_saving_and_the_main_one_writes(four):
    folder, _, _, ranks = four
    for backend, _ in ranks:
        calls = [name for name, _ in backend.calls]
        assert calls == ["state", "save"] * 4 + ["load"] * calls.count("load")  # steps 3, 4, 6, 8
        directories = [directory for name, directory in backend.calls if name == "save"]
        assert all((directory is not None) == backend.main for directory in directories)
    assert len(checkpoints(folder / "four")) == 4
    assert len(load_state(folder / "four" / "last")["rng"]) == 4
    one, all_four = (load_model(folder / name / "last").state_dict() for name in ("one", "four"))
    for name in one:
        torch.testing.assert_close(one[name], all_four[name], atol=2e-6, rtol=0)


def test_every_rank_takes_part_in_resuming(four):
    folder, data, weights, _ = four
    ranks = on_every_rank(lambda rank, exchange: fit(folder / "four", data, weights, rank, exchange, max_steps=9), 4)
    for backend, _ in ranks:
        assert [name for name, _ in backend.calls[:2]] == ["load", "load_state"]
    assert load_state(folder / "four" / "last")["progress"]["step"] == 9


def test_a_sum_counts_the_ranks_of_a_data_rank_once(tmp_path):
    data = toy_data(tmp_path, batch_size=8)
    model = toy_trainer(tmp_path, data).model
    expected = evaluate(model, data, with_error=True)

    def work(rank, exchange):
        backend = ThreadRank(rank, exchange)
        alone = {"only_here": float(rank == 3), "groups": torch.full((2, 3), 1.5, dtype=torch.float64)}
        return evaluate(model, data, backend=backend, with_error=True), backend.sum_named(alone)

    for found, sums in on_every_rank(work, 4):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["loss_error"] == pytest.approx(expected["loss_error"], rel=1e-4)  # of differences in float32
        assert sums["only_here"] > 0  # what a single rank has received reaches all of them
        assert sums["groups"] == [[3.0] * 3] * 2


def test_the_reference_of_a_preference_run_goes_by_data_rank():
    shares: list = []

    class Source:
        n_pairs, steps_per_epoch = 1, 1

        def batch(self, step, rank, world):
            shares.append((rank, world))
            empty = torch.zeros(0, 4, dtype=torch.int64)
            return Batch(empty, empty)

    class Tuned:
        training = False

        def eval(self): ...

        def train(self, mode): ...

        def text_log_probs(self, *_):
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0), None

    found = reference_room._log_probs(Tuned(), [Source()], ThreadRank(3, Exchange(4)), 1)
    assert shares == [(1, 2)] and np.isnan(found).all()
